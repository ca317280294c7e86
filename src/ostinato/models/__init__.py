"""Models: the registry of architectures, one file a family, and the decoder they share."""
