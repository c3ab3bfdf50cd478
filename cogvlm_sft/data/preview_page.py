"""The preview as a page: pictures as the model gets them, tokens coloured by what is learnt.

One self-contained HTML page. A picture is the transform's own output, turned back from pixel values
into colours, so what a person sees is what the vision tower sees: squashed to a square, and with
whatever the conversion to RGB did.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image

from cogvlm_sft.conversation import resolve_image
from cogvlm_sft.data.encode import EncodedConversation
from cogvlm_sft.data.pictures import read_picture
from cogvlm_sft.data.preview import Previewed, picture_line
from cogvlm_sft.errors import DataError
from cogvlm_sft.model.processing_cogvlm import IGNORE_INDEX, CogVLMProcessor
from cogvlm_sft.model.token_layout import build_position_ids

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Preview</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root{--ink:#1b2328;--soft:#63707a;--line:#e1e6ea;--paper:#f6f7f8;--card:#fff;--learn:#1f7a4d;--learnt:#dff3e7}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaed;--soft:#98a4ad;--line:#2c353c;--paper:#14191d;
--card:#1c2328;--learn:#7fd3a5;--learnt:#1d3a2c}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0}
main{max-width:1080px;margin:0 auto;padding:2rem 1.2rem 4rem}
h1{font-size:1.7rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .2rem;overflow-wrap:anywhere}
p{color:var(--soft);margin:.2rem 0 .8rem;max-width:52rem}
.row{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem;
display:flex;gap:1rem;align-items:flex-start;flex-wrap:wrap;margin-bottom:.8rem}
figure{margin:0;width:245px}figure img{width:245px;height:245px;border-radius:8px;display:block;
image-rendering:auto}figcaption{font-size:.78rem;color:var(--soft);overflow-wrap:anywhere}
.tokens{flex:1 1 320px;display:flex;flex-wrap:wrap;gap:3px;align-content:flex-start}
.t{border:1px solid var(--line);border-radius:6px;padding:.1rem .35rem;
font:.8rem/1.3 ui-monospace,Menlo,monospace;white-space:pre}
.t small{display:block;color:var(--soft);font-size:.62rem}
.t.learn{background:var(--learnt);border-color:var(--learn)}.t.learn small b{color:var(--learn)}
.t.picture{border-style:dashed;color:var(--soft)}
</style></head><body><main><h1>What training sees</h1>
<p>Every token with its position. Green: the model learns to predict, at this place, the token that
stands after the arrow. The picture is what the vision tower gets.</p>
{% for one in conversations %}<h2>{{ one.id }}</h2><p>source {{ one.source }}, style {{ one.style
}}{% if one.dropped %}; {{ one.dropped }} round(s) are over the length and dropped{% endif %}</p>
{% for row in one.rows %}<div class="row">{% for picture in row.pictures %}<figure>
{% if picture.data %}<img src="{{ picture.data }}" alt="">{% endif %}<figcaption>{{ picture.says
}}</figcaption></figure>{% endfor %}<div class="tokens">{% for t in row.tokens %}<span
 class="t{{ t.kind }}">{{ t.text }}<small>{{ t.position }}{% if t.target %} → <b>{{ t.target
}}</b>{% endif %}</small></span>{% endfor %}</div></div><p>{{ row.says }}</p>{% endfor %}
{% endfor %}</main></body></html>
"""


def render_page(
    previewed: Sequence[Previewed], processor: CogVLMProcessor, image_root: Path
) -> str:
    """The page.

    Args:
        previewed: See `cogvlm_sft.data.preview.encode_chosen`.
        processor: Names the tokens and transforms the pictures.
        image_root: Where the pictures are.
    """
    conversations = [
        {
            "id": one.conversation.id,
            "source": one.conversation.source,
            "style": one.conversation.style,
            "dropped": one.dropped_rounds,
            "rows": [
                {
                    "pictures": [
                        {
                            "data": _as_seen(name, processor, image_root),
                            "says": picture_line(name, processor, image_root),
                        }
                        for name in row.images
                    ],
                    "tokens": _tokens(row, processor),
                    "says": f"{len(row.input_ids)} tokens, {row.supervised} with loss",
                }
                for row in one.rows
            ],
        }
        for one in previewed
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_PAGE).render(conversations=conversations)


def _tokens(row: EncodedConversation, processor: CogVLMProcessor) -> list[dict[str, Any]]:
    name = processor.tokenizer.convert_ids_to_tokens
    positions = build_position_ids(torch.tensor([row.token_type_ids]))[0].tolist()
    pictures = iter(row.images)
    tokens = []
    place, end = 0, len(row.input_ids)
    while place < end:
        last = place
        if row.token_type_ids[place]:
            last = place + processor.num_image_tokens - 1
        label = row.labels[last + 1] if last + 1 < end else IGNORE_INDEX
        learns = label != IGNORE_INDEX
        tokens.append(
            {
                "text": next(pictures) if last > place else name(row.input_ids[place]),
                "position": positions[place]
                if last == place
                else f"{positions[place]}-{positions[last]}",
                "target": name(label) if learns else "",
                "kind": (" picture" if last > place else "") + (" learn" if learns else ""),
            }
        )
        place = last + 1
    return tokens


def _as_seen(name: str, processor: CogVLMProcessor, image_root: Path) -> str:
    """The picture after the transform, as a PNG data URI; empty where it cannot be read."""
    try:
        picture = read_picture(resolve_image(image_root, name), name)
    except DataError:
        return ""
    transform = processor.image_processor
    values = np.asarray(transform(picture, return_tensors="np")["pixel_values"])
    values = values.reshape(3, *values.shape[-2:]).transpose(1, 2, 0)
    colours = values * np.asarray(transform.image_std) + np.asarray(transform.image_mean)
    stream = io.BytesIO()
    Image.fromarray((colours * 255).round().clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
