"""Chat templates of the kinds that models come with: each shows text in one form of a message's content, or in both."""

_ENDS = "{% if add_generation_prompt %}Assistant:{% endif %}"

#: Takes parts only, and writes nothing for a string: as SmolVLM's.
PARTS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + _ENDS
)
#: Takes parts only, images before text: as LLaVA's.
IMAGES_FIRST = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}" + _ENDS
)
#: Takes strings only, and writes nothing for parts: as Qwen3's.
STRINGS = (
    "{% for message in messages %}{% if message.content is string %}{% set content = message.content %}"
    "{% else %}{% set content = '' %}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ content }}<|im_end|>\n{% endfor %}" + _ENDS
)
#: Takes strings only, and prints a list with its brackets: as ChatML's.
PRINTED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}" + _ENDS
)
#: The same, as JSON.
PRINTED_JSON = STRINGS.replace("{% set content = '' %}", "{% set content = message.content | tojson %}")
#: Refuses a list.
JOINED = "{% for message in messages %}{{ message.role + ': ' + message.content }}\n{% endfor %}" + _ENDS
#: Takes both, and writes them in other ways.
BOTH = (
    "{% for message in messages %}{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text | trim }}"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}" + _ENDS
)

TEMPLATES = {
    "parts": PARTS,
    "images first": IMAGES_FIRST,
    "strings": STRINGS,
    "printed": PRINTED,
    "printed JSON": PRINTED_JSON,
    "joined": JOINED,
    "both": BOTH,
}
