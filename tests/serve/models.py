"""A tiny random model with a tokenizer of bytes and a chat template that knows tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.models import SMALL

POSITIONS = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}. Call them as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and loop.first %}{{ raise_exception("the user speaks first") }}{% endif -%}
<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


_TOOLS = "{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}"
_OTHERS = "[INST]{{ message.content }}[/INST]{% endif %}{% endfor %}"
MISTRAL = {
    "[TOOL_CALLS]": _TOOLS
    + """{%- for message in messages %}{% if message.tool_calls %}[TOOL_CALLS][
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("an id has nine characters") }}{% endif -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}{% endfor %}]
{%- else %}"""
    + _OTHERS,
    "[ARGS]": _TOOLS
    + """{%- for message in messages %}{% if message.tool_calls %}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("an id has nine characters") }}{% endif -%}
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}
{%- else %}"""
    + _OTHERS,
}
"""Templates that teach Mistral's two ways to write calls, by what only the newer one has."""
MISTRAL_SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[INST]", "[/INST]")


def save(folder: Path, template: str = TEMPLATE, more_special: tuple[str, ...] = ()) -> Path:
    """A model folder; the same weights each time."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["th", "in", "er", "an"]
    vocab = {token: n for n, token in enumerate([*alphabet, *words])}
    library = Tokenizer(models.BPE(vocab=vocab, merges=[(word[0], word[1]) for word in words]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *more_special)]
    )
    size = library.get_vocab_size(with_added_tokens=True)
    ids = {token: library.token_to_id(token) for token in SPECIAL}
    library.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": "<|im_end|>", "chat_template": template, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    changes = {
        "vocab_size": size,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes)).eval()
    for key, weight in model.requires_grad_(False).named_parameters():
        weight.normal_(1.0 if "norm" in key else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder
