"""The OpenAI-compatible server: an engine in a process of its own, HTTP in another.

`messages` is what the two say to each other, `worker` the engine's side, `client` the other side,
`api` and `app` are HTTP, `server` starts and ends it all. Only `worker` imports torch.
"""
