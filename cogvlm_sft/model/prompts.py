"""The released model's prompts, for strings and as a Jinja chat template.

The two forms render the same text, which a test holds. Notable choices: a round's only picture goes
in front of the round, several pictures stay where they stand; there is no EOS between rounds, since
the released model sees its history without it, so the template closes the last answer alone.
The released `base` prompt knows no history; ours joins it by newlines like the others.
"""

from cogvlm_sft.errors import ModelInputError

IMAGE_MARKER = "<image>"

# What stands before all rounds, before a question, and between a question and its answer. The rule
# is `_history_to_prompt` of the released code; `text` is Vicuna v1.5's prompt.
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
PROMPTS: dict[str, tuple[str, str, str]] = {
    "chat": ("", "Question: ", " Answer:"),
    "vqa": ("", "Question: ", " Short answer:"),
    "base": ("", "", ""),
    "text": (_VICUNA, "USER: ", " ASSISTANT:"),
}

# The same layout for messages. A round's only picture goes before the round; several stay where
# they stand. EOS closes the last answer alone, since the released model sees history without it.
CHAT_TEMPLATE = r"""
{%- macro flat(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set prompts = PROMPTS -%}
{%- set seen = namespace(pictures=0, closed=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{%- set seen.closed = loop.index0 -%}
{%- elif message['role'] == 'user' -%}
{%- set seen.pictures = seen.pictures + flat(message['content']).count('<image>') -%}
{%- else -%}
{{- raise_exception("CogVLM's prompts have no '" ~ message['role'] ~ "' message; "
    ~ "put its words into the first question") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- set seen.closed = -1 -%}{%- endif -%}
{%- set kind = style | default(default_style | default('chat') if seen.pictures else 'text') -%}
{%- if kind not in prompts -%}
{{- raise_exception("style is '" ~ kind ~ "', expected chat, vqa, base or text") -}}
{%- endif -%}
{{- bos_token ~ prompts[kind][0] -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set text = flat(message['content']) -%}
{%- set pieces = text.split('<image>') -%}
{{- '' if loop.first else '\n' -}}
{%- if pieces | length == 2 -%}
{{- '<image>' ~ prompts[kind][1] ~ (pieces[0].strip() ~ ' ' ~ pieces[1].strip()).strip() -}}
{%- else -%}{{- prompts[kind][1] ~ text.strip() -}}{%- endif -%}
{%- if (loop.last and add_generation_prompt)
    or (not loop.last and loop.nextitem['role'] == 'assistant') -%}
{{- prompts[kind][2] -}}
{%- endif -%}
{%- else -%}
{%- set answer = ' ' ~ flat(message['content']).strip() -%}
{%- set ending = eos_token if loop.index0 == seen.closed else '' -%}
{% generation %}{{- answer ~ ending -}}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
""".replace("PROMPTS", repr({style: list(parts) for style, parts in PROMPTS.items()})).strip()


def check_style(style: str) -> None:
    """Refuses a style that is not one of the four.

    Raises:
        ModelInputError: Naming the styles.
    """
    if style not in PROMPTS:
        raise ModelInputError(f"style is {style!r}, expected one of {', '.join(PROMPTS)}")


def place_pictures(words: str) -> tuple[str, str]:
    """A question's only picture goes before the round; several stay where they stand."""
    if words.count(IMAGE_MARKER) != 1:
        return "", words.strip()
    before, after = words.split(IMAGE_MARKER)
    return IMAGE_MARKER, f"{before.strip()} {after.strip()}".strip()
