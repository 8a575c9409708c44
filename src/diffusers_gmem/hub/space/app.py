# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
A GMem pipeline as a web page: draw from its memory, explore it, mix memories, add an image of your own.

    make quickstart && python examples/space/app.py
    python examples/space/app.py --model me/gmem-mine
    GMEM_MODEL=me/gmem-mine python app.py  # on a Space, to which `diffusers_gmem.hub.push_space` puts this file

Images go to and fro inside the messages of the page. The server writes no file and serves none: an upload is decoded in RAM
and forgotten with the answer.
"""

import argparse
import base64
import html
import io
import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode


# Before Gradio is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import torch
from fastapi import HTTPException, Response
from fastapi.middleware import Middleware
from huggingface_hub import RepoCard

from diffusers_gmem import GMemFlowMatchScheduler, GMemPipeline, GMemPipelineOutput
from diffusers_gmem.hub import HubRepo, memory_bank_card
from diffusers_gmem.models.snippet_mixing import INTERPOLATION_METHODS
from diffusers_gmem.models.snippet_sources import SnippetSources, attach_sources
from diffusers_gmem.pipelines.provenance import publishable


logger = logging.getLogger(__name__)

# What `make quickstart` makes
DEFAULT_MODEL = "quickstart/pipeline"
# Column of a bank's metadata that holds image files
THUMBNAIL = "thumbnail"
NO_IMAGE = "An image is missing: choose a PNG, JPEG or WebP file first."
NO_WORDS = "Words are missing: say what to look for."

MAX_IMAGES = 12
MAX_STEPS = 100
MAX_SEED = 2**32 - 1
MAX_TEXT = 300
MAX_WAITING = 20
PREVIEW_STEPS = 10

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_UPLOAD_BYTES = 5 * 2**20
MAX_UPLOAD_PIXELS = 16 * 10**6
# The base64 of an upload, and room for everything else
MAX_REQUEST_BYTES = 2 * MAX_UPLOAD_BYTES
# Gradio's own ways to put files on the server and to get them back; this page uses none
CLOSED_ROUTES = re.compile(r"/gradio_api/(upload|file|stream|process_recording|proxy|deep_link)\b.*", re.DOTALL)

# The fonts of the device: none has to be fetched
FONTS = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]
CSS = """
.gmem-images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 45%), 1fr)); gap: 0.75rem; }
.gmem-images figure { margin: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden;
  background: var(--block-background-fill); display: flex; flex-direction: column; }
.gmem-images img { width: 100%; aspect-ratio: 1; object-fit: contain; background: white; display: block; }
.gmem-images img.small { image-rendering: pixelated; }
.gmem-images .none { aspect-ratio: 1; display: grid; place-items: center; opacity: 0.75; }
.gmem-images figcaption { padding: 0.5rem 0.6rem; font-size: 0.85rem; line-height: 1.35; overflow-wrap: anywhere;
  display: flex; flex-direction: column; gap: 0.15rem; flex: 1; }
.gmem-images figcaption .details, .gmem-note { opacity: 0.75; }
.gmem-images figcaption a { margin-top: auto; align-self: flex-start; padding: 0.3rem 0; }
.gmem-images a, .gmem-link a { color: var(--link-text-color); text-decoration: underline; }
.gmem-note, .gmem-link { margin: 0.75rem 0 0; }
.gmem-empty { border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 3rem 1rem; text-align: center; }
.gmem-upload { display: flex; flex-direction: column; gap: 0.4rem; }
.gmem-upload input { display: block; width: 100%; margin-top: 0.4rem; }
.gmem-upload [role=alert] { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.gmem-upload img { max-width: 100%; max-height: 14rem; object-fit: contain; align-self: flex-start; border-radius: 8px; }
.gmem-about thead:not(:has(th:not(:empty))) { display: none; }
@media (max-width: 480px) { .tab-container button { padding: 0 0.25rem !important; font-size: 0.85rem !important; } }
.gmem-output .html-container { padding: 0; }
"""

# A download is the very PNG that is shown
DOWNLOAD = """
element.addEventListener("click", (event) => {
  const link = event.target.closest("a[download]");
  if (!link) return;
  const data = link.closest("figure").querySelector("img").src.split(",")[1];
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  link.href = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
});
"""

UPLOAD_TEMPLATE = f"""
<div class="gmem-upload">
  <label>${{label}}<input type="file" accept="image/png,image/jpeg,image/webp"></label>
  <span class="gmem-note">PNG, JPEG or WebP, up to {MAX_UPLOAD_BYTES >> 20} MB and {MAX_UPLOAD_PIXELS // 10**6} megapixels.
  Nothing is stored.</span>
  <span role="alert"></span>
  <img alt="The image that you chose" hidden>
</div>
"""
UPLOAD = f"""
element.addEventListener("change", (event) => {{
  const file = event.target.files[0], alert = element.querySelector("[role=alert]"), image = element.querySelector("img");
  image.hidden = true;
  alert.textContent = "";
  props.value = "";
  if (!file) return;
  if (file.size > {MAX_UPLOAD_BYTES}) {{
    alert.textContent = "This file is too large: up to {MAX_UPLOAD_BYTES >> 20} MB are accepted.";
    return;
  }}
  const reader = new FileReader();
  reader.onload = () => {{
    props.value = reader.result;
    image.onload = () => (image.hidden = false);
    image.src = reader.result;
  }};
  reader.readAsDataURL(file);
}});
"""


class LimitedRequests:
    """Closes the routes for files, and refuses requests that are too large, before they are read into memory."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        received = 0

        async def receive_some():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_REQUEST_BYTES:
                raise HTTPException(413, "This request is too large.")
            return message

        if scope["type"] == "http" and CLOSED_ROUTES.fullmatch(scope["path"]):
            await Response("This page keeps no files.", 404)(scope, receive, send)
        else:
            await self.app(scope, receive_some, send)


# Settings: a component of the page, and what accepts its value, wherever that comes from (the page, a link, the API)


class Field(NamedTuple):
    component: gr.components.Component
    check: Callable[[Any], Any]


def refusal(sentence: str) -> gr.Error:
    return gr.Error(sentence, print_exception=False)


def number_field(
    label: str,
    lowest: float,
    highest: float,
    value: float,
    component: type = gr.Slider,
    step: float = 1,
    **kwargs,
) -> Field:
    """A number, whole if `step` is 1."""
    whole = step == 1

    def check(given: Any) -> float:
        try:
            number = float(given)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not lowest <= number <= highest or (whole and number != int(number)):
            kind = "a whole number" if whole else "a number"
            raise refusal(f"{label} has to be {kind} from {lowest} to {highest}.")
        return int(number) if whole else number

    component = component(value=value, label=label, minimum=lowest, maximum=highest, step=step, **kwargs)
    return Field(component, check)


def choice_field(label: str, choices: list, component: type = gr.Radio, **kwargs) -> Field:
    """One of `choices`, each a value or a name and a value. A link holds the value as text."""
    values = [choice[1] if isinstance(choice, tuple) else choice for choice in choices]

    def check(given: Any) -> Any:
        chosen = [value for value in values if isinstance(given, str | int) and str(value) == str(given)]
        if not chosen:
            raise refusal(f"{label} has to be one of those that are offered.")
        return chosen[0]

    return Field(component(choices=choices, value=values[0], label=label, **kwargs), check)


def checkbox_field(label: str, value: bool, **kwargs) -> Field:
    return Field(gr.Checkbox(value=value, label=label, **kwargs), lambda given: str(given) == "True")


def text_field(label: str, **kwargs) -> Field:
    def check(given: Any) -> str:
        if not isinstance(given, str) or len(given) > MAX_TEXT:
            raise refusal(f"{label} has to be a text of up to {MAX_TEXT} characters.")
        return given.strip()

    return Field(gr.Textbox(value="", label=label, max_lines=1, max_length=MAX_TEXT, **kwargs), check)


def image_field(label: str, **kwargs) -> Field:
    component = gr.HTML(
        value="", label=label, html_template=UPLOAD_TEMPLATE, js_on_load=UPLOAD, apply_default_css=False, **kwargs
    )
    return Field(component, decode_upload)


def decode_upload(data_url: Any) -> PIL.Image.Image | None:
    """The image of a data URL, or `None` for an empty text."""
    if not data_url:
        return None
    encoded = data_url.partition(";base64,")[2] if isinstance(data_url, str) else ""
    if len(encoded) > MAX_UPLOAD_BYTES * 4 // 3 + 4:
        raise refusal(f"The image is too large: up to {MAX_UPLOAD_BYTES >> 20} MB are accepted.")
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        content = b""
    return decode_image(content)


def decode_image(content: bytes) -> PIL.Image.Image:
    """The image of a file that nobody vouches for. Its size is checked before its pixels are read."""
    limit = f"up to {MAX_UPLOAD_PIXELS // 10**6} megapixels are accepted. Make it smaller first."
    try:
        with warnings.catch_warnings(action="ignore", category=PIL.Image.DecompressionBombWarning):
            image = PIL.Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS)
        if image.width * image.height > MAX_UPLOAD_PIXELS:
            raise refusal(f"The image has {image.width} x {image.height} pixels: {limit}")
        image.verify()
        image = PIL.Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS)
        return PIL.ImageOps.exif_transpose(image)
    except gr.Error:
        raise
    except PIL.Image.DecompressionBombError:
        raise refusal(f"The image has too many pixels: {limit}") from None
    # Files that are made to break Pillow make it raise nearly everything
    except Exception:
        raise refusal("This is not a PNG, JPEG or WebP image that can be read.") from None


# What is shown: HTML, in which everything that is not ours is escaped


def png_url(image: PIL.Image.Image, pnginfo: PIL.PngImagePlugin.PngInfo | None = None) -> str:
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=pnginfo)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def figure(
    picture: PIL.Image.Image | None,
    alt: str,
    lines: list[str],
    filename: str | None = None,
    pnginfo: PIL.PngImagePlugin.PngInfo | None = None,
) -> str:
    """A picture, what is to be said about it (the first line stands out), and its download if it has a `filename`."""
    shown = '<span class="none">no picture</span>'
    if picture is not None:
        small = ' class="small"' if picture.width < 128 else ""
        shown = f'<img src="{png_url(picture, pnginfo)}" alt="{html.escape(alt)}"{small}>'
    first, *details = map(html.escape, lines)
    caption = f"<strong>{first}</strong>" + "".join(f'<span class="details">{line}</span>' for line in details)
    if filename is not None:
        caption += f'<a href="#" download="{filename}" aria-label="Download {html.escape(alt)}">Download</a>'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def images_html(figures: list[str], note: str = "") -> str:
    note = f'<p class="gmem-note">{html.escape(note)}</p>' if note else ""
    return f'<div class="gmem-images">{"".join(figures)}</div>{note}'


def empty(sentence: str) -> str:
    return f'<div class="gmem-empty">{sentence}</div>'


class Demo:
    """
    The page of a pipeline.

    Args:
        pipe ([`GMemPipeline`]): The pipeline.
        name (`str`): What it is called on the page.
        license (`str`, *optional*): Of the model.
        bank_license (`str`, *optional*): Of the images that the bank was made from.
    """

    def __init__(self, pipe: GMemPipeline, name: str, license: str | None = None, bank_license: str | None = None):
        self.pipe, self.name, self.license, self.bank_license = pipe, name, license, bank_license
        pipe.set_progress_bar_config(disable=True)
        self.bank = pipe.load_memory_bank()
        self.reads_images = pipe.image_encoder is not None and pipe.image_processor is not None
        text_models = (pipe.text_encoder, pipe.tokenizer)
        self.reads_words = self.bank is not None and self.bank.text_model is not None and None not in text_models
        self.labels = None if self.bank is None else self.bank.labels
        self.tabs: dict[str, dict[str, Field]] = {}

    # The page

    def build(self) -> gr.Blocks:
        with gr.Blocks(title=f"Draw from memory: {self.name}", analytics_enabled=False) as page:
            gr.Markdown(
                f"# Draw from memory\n**{html.escape(self.name)}** is an image generator with a memory: every image is "
                "drawn from a *memory*, the features of one image that is kept in a bank. Draw from the bank, look into "
                "it, mix what it holds, or show it something new."
            )
            with gr.Tabs() as tabs:
                for title, add, lack in (
                    ("Generate", self.add_generate, self.bank is None),
                    ("Explore", self.add_explore, self.bank is None),
                    ("Mix", self.add_mix, self.bank is None),
                    ("Your image", self.add_image, not self.reads_images),
                    ("About", self.add_about, False),
                ):
                    key = title.split()[-1].lower()
                    with gr.Tab(title, id=key):
                        if lack:
                            what = "no image encoder" if title == "Your image" else "no memory bank"
                            gr.HTML(empty(f"This pipeline has {what}."))
                        else:
                            add(key)
            fields = [field for tab in self.tabs.values() for field in tab.values()]
            page.load(
                self.restore,
                outputs=[tabs, *(field.component for field in fields)],
                api_visibility="private",
                show_progress="hidden",
            )
        return page

    def add_generate(self, key: str) -> None:
        sources = [("The whole bank", "bank")]
        sources += [("A class", "class")] if self.labels is not None else []
        sources += [("Words", "words")] if self.reads_words else []
        sources += [("Memory numbers", "numbers")]
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = {"source": choice_field("Draw from", sources)}
                conditions = {}
                if self.labels is not None:
                    conditions["class"] = fields["label"] = self.label_field()
                if self.reads_words:
                    conditions["words"] = fields["words"] = text_field("Words", placeholder="a red mug", visible=False)
                conditions["numbers"] = fields["numbers"] = text_field(
                    "Memory numbers", placeholder="12, 700", info=f"0 to {len(self.bank) - 1}", visible=False
                )
                fields["count"] = number_field("Memories", 1, MAX_IMAGES, 4)
                fields["each"] = number_field("Images of each", 1, MAX_IMAGES, 1)
                fields |= self.sampling_fields()
                button = gr.Button("Generate", variant="primary")
            output = self.output_column()
        self.show_with(fields["source"], conditions)
        self.connect(key, fields, button, self.generate, output)

    def add_explore(self, key: str) -> None:
        ways = [("All", "all")]
        ways += [("A class", "class")] if self.labels is not None else []
        ways += [("Like a memory", "memory")]
        ways += [("Like an image", "image")] if self.reads_images else []
        ways += [("Words", "words")] if self.reads_words else []
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = {"show": choice_field("Show", ways)}
                conditions = {}
                if self.labels is not None:
                    conditions["class"] = fields["label"] = self.label_field()
                conditions["memory"] = fields["memory"] = self.memory_field("Memory number", 0, visible=False)
                if self.reads_images:
                    conditions["image"] = fields["image"] = image_field("Image", visible=False)
                if self.reads_words:
                    conditions["words"] = fields["words"] = text_field("Words", visible=False)
                fields["count"] = number_field("Memories", 1, MAX_IMAGES, 8)
                fields["page"] = number_field("Page", 1, len(self.bank), 1, gr.Number)
                if not self.has_thumbnails:
                    fields["preview"] = checkbox_field("Draw a quick preview of each", True)
                button = gr.Button("Search", variant="primary")
            output = self.output_column("What the bank holds appears here.")
        self.show_with(fields["show"], conditions)
        self.connect(key, fields, button, self.explore, output)

    def add_mix(self, key: str) -> None:
        fields, last = {}, len(self.bank) - 1
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                # Half of memory 1 and half of memory 2, until somebody moves a slider
                for k, weight in enumerate((0.5, 0.5, 0, 0), start=1):
                    with gr.Row():
                        memory = self.memory_field(f"Memory {k}", last * (k - 1) // 3, scale=1, min_width=90)
                        fields[f"memory_{k}"] = memory
                        fields[f"weight_{k}"] = number_field(
                            f"Weight {k}", -1, 1, weight, step=0.05, scale=2, min_width=160
                        )
                shuffle = gr.Button("Pick memories at random", size="sm")
                fields |= self.sampling_fields()
                button = gr.Button("Mix", variant="primary")
                with gr.Group():
                    fields["method"] = choice_field("Path from memory 1 to memory 2", list(INTERPOLATION_METHODS))
                    fields["frames"] = number_field("Images on the path", 2, MAX_IMAGES, 8)
                interpolate = gr.Button("Interpolate", variant="primary")
            output = self.output_column()
        shuffle.click(
            lambda: self.bank.sample(4)[1].tolist(),
            outputs=[fields[f"memory_{k}"].component for k in range(1, 5)],
            queue=False,
            api_visibility="private",
        )
        self.connect(key, fields, button, self.mix, output)
        self.connect(key, fields, interpolate, self.interpolate, output, enter=False)

    def add_image(self, key: str) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = {
                    "image": image_field("Image"),
                    "count": number_field("Variations", 1, MAX_IMAGES, 4),
                    **self.sampling_fields(),
                }
                button = gr.Button("Draw variations", variant="primary")
            output = self.output_column("Variations of your image appear here.")
        self.connect(key, fields, button, self.vary, output)

    def add_about(self, key: str) -> None:
        gr.Markdown(self.about(), elem_classes="gmem-about")
        if self.bank is not None:
            with gr.Accordion("Card of the memory bank", open=False) as accordion:
                card = gr.Markdown("One moment.", elem_classes="gmem-about")
            accordion.expand(self.bank_card, outputs=card, api_visibility="private", concurrency_id="pipeline")

    def label_field(self) -> Field:
        labels = self.labels.unique().tolist()
        return choice_field("Class", [(self.label_name(i), i) for i in labels], gr.Dropdown, visible=False)

    def memory_field(self, label: str, value: int | None, **kwargs) -> Field:
        return number_field(label, 0, len(self.bank) - 1, value, gr.Number, **kwargs)

    def sampling_fields(self) -> dict[str, Field]:
        with gr.Accordion("Sampling", open=False):
            fields = {"steps": number_field("Steps", 1, MAX_STEPS, 50)}
            # A guider that the pipeline brings has a scale of its own
            if self.pipe.guider is None:
                fields["guidance"] = number_field("Guidance (1 is none)", 1, 20, 1, step=0.1)
        with gr.Row(equal_height=True):
            fields["seed"] = number_field("Seed", 0, MAX_SEED, 0, gr.Number, min_width=120)
            fields["random_seed"] = checkbox_field("New seed each time", True, min_width=120, container=False)
        return fields

    def output_column(self, sentence: str = "The images appear here.") -> gr.HTML:
        with gr.Column(scale=2, min_width=300):
            return gr.HTML(
                empty(sentence),
                js_on_load=DOWNLOAD,
                apply_default_css=False,
                elem_classes="gmem-output",
                min_height=220,
            )

    def show_with(self, switch: Field, conditions: dict[str, Field]) -> None:
        """Of some fields shows the one whose name is chosen."""
        switch.component.change(
            lambda chosen: [gr.update(visible=name == chosen) for name in conditions],
            inputs=switch.component,
            outputs=[field.component for field in conditions.values()],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def connect(
        self, tab: str, fields: dict[str, Field], button: gr.Button, run: Callable, output: gr.HTML, enter: bool = True
    ) -> None:
        """Runs a function with the checked settings, when the button is pressed or, with `enter`, the key in a field."""
        self.tabs[tab] = fields

        def answer(values: dict, progress=gr.Progress()):  # noqa: B008 (this is how Gradio knows it)
            try:
                settings = {name: field.check(values[field.component]) for name, field in fields.items()}
                if settings.get("random_seed"):
                    settings["seed"], settings["random_seed"] = random.randint(0, MAX_SEED), False
                shown = run(progress, **settings) + self.link(tab, settings)
            except gr.Error:
                raise
            # The text of an error may name files of the server
            except Exception:
                logger.exception("%s failed.", run.__name__)
                raise refusal("Something failed on the server; its log says what.") from None
            return (shown, settings["seed"]) if "seed" in fields else shown

        triggers = [button.click]
        if enter:
            components = [field.component for field in fields.values()]
            triggers += [item.submit for item in components if isinstance(item, gr.Textbox | gr.Number)]
        gr.on(
            triggers,
            answer,
            inputs={field.component for field in fields.values()},
            outputs=[output, fields["seed"].component] if "seed" in fields else output,
            # The fields check the values, and say what is wrong
            preprocess=False,
            show_progress_on=output,
            scroll_to_output=True,
            concurrency_id="pipeline",
            api_name=run.__name__,
        )

    def link(self, tab: str, settings: dict[str, Any]) -> str:
        """A link that brings the settings back, but not an uploaded image."""
        told = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
        address = html.escape(f"?{urlencode({'tab': tab, **told})}")
        return f'<p class="gmem-link"><a href="{address}" target="_blank">Link to these settings</a></p>'

    def restore(self, request: gr.Request) -> list:
        """The tab and the settings that the address of the page holds."""
        given = dict(request.query_params)
        tab = given.get("tab")
        updates = [gr.skip() if tab not in self.tabs else gr.Tabs(selected=tab)]
        for key, fields in self.tabs.items():
            for name, field in fields.items():
                update = gr.skip()
                if key == tab and name in given and name != "image":
                    try:
                        update = field.check(given[name])
                    except gr.Error as error:
                        gr.Warning(f"The link holds a setting that does not fit. {error.message}")
                updates.append(update)
        return updates

    # What the tabs do

    def generate(
        self,
        progress: gr.Progress,
        *,
        source: str,
        count: int,
        each: int,
        label: int | None = None,
        words: str = "",
        numbers: str = "",
        **sampling,
    ) -> str:
        if source == "bank":
            what = {"num_images": count}
        elif source == "class":
            what = {"class_labels": [label] * count}
        elif source == "words":
            count = min(count, len(self.bank))
            what = {"prompt": needed(words, NO_WORDS), "num_images": count}
        else:
            what = {"memory_indices": self.memory_numbers(numbers)}
        memories = len(what.get("memory_indices", range(count)))
        if memories * each > MAX_IMAGES:
            raise refusal(f"{memories} memories and {each} images of each are too many: up to {MAX_IMAGES} at a time.")
        return self.draw(progress, memories * each, num_images_per_memory=each, **what, **sampling)

    def explore(
        self,
        progress: gr.Progress,
        *,
        show: str,
        count: int,
        page: int,
        label: int | None = None,
        memory: int | None = None,
        image: PIL.Image.Image | None = None,
        words: str = "",
        preview: bool = False,
    ) -> str:
        count_all = len(self.bank)
        start, stop = (page - 1) * count, page * count
        scores = None
        if show == "class":
            rows = self.bank.indices_of(label)
            count_all = len(rows)
        elif show == "all":
            rows = torch.arange(min(stop, count_all))
        elif stop > count_all:
            rows = torch.empty(0)
        elif show == "words":
            text_models = (self.pipe.text_encoder, self.pipe.tokenizer)
            scores, rows = self.bank.search_text(needed(words, NO_WORDS), stop, *text_models)
        else:
            query = memory if show == "memory" else self.pipe.encode_image(needed(image, NO_IMAGE))[0]
            scores, rows = self.bank.nearest(query, stop)
        if start >= len(rows):
            raise refusal(
                f"Page {page} is beyond the {count_all} memories: with {count} on each, there are fewer pages."
            )
        rows = rows[start:stop].tolist()
        pictures = map(self.thumbnail, rows)
        if preview:
            pictures = self.preview(progress, rows)
        figures = []
        described = publishable(self.bank.describe_rows(rows))
        for k, (source, picture) in enumerate(zip(described, pictures, strict=True)):
            score = [] if scores is None else [f"similarity {scores[start + k]:.3f}"]
            name = f"Memory {source['index']}"
            figures.append(figure(picture, name, [name, *score, *facts(source)]))
        note = f"{start + 1} to {start + len(rows)} of {count_all}."
        if preview:
            note += f" The pictures are drawn from the memories, in {PREVIEW_STEPS} steps."
        return images_html(figures, note)

    def mix(self, progress: gr.Progress, *, method: str, frames: int, **sampling) -> str:
        weights = [sampling.pop(f"weight_{k}") for k in range(1, 5)]
        memories = [sampling.pop(f"memory_{k}") for k in range(1, 5)]
        sources = [(i, weight) for i, weight in zip(memories, weights, strict=True) if weight != 0]
        if not sources:
            raise refusal("All weights are 0: move the slider of a memory.")
        try:
            mixed = self.bank.mix([i for i, _ in sources], [weight for _, weight in sources])
        except ValueError:
            raise refusal("With these weights nothing is left of the memories: change one of them.") from None
        alone = [i for i, _ in sources]
        snippets = torch.cat([mixed[None], self.bank[alone].float()])
        attach_sources(snippets, SnippetSources([sources, *([(i, 1.0)] for i in alone)], self.bank))
        note = "The mixture, and each memory alone, from the same noise."
        return self.draw(progress, len(snippets), note, memory=snippets, same_noise=True, **sampling)

    def interpolate(self, progress: gr.Progress, *, method: str, frames: int, **settings) -> str:
        first, second = settings["memory_1"], settings["memory_2"]
        sampling = {name: settings[name] for name in ("steps", "guidance", "seed") if name in settings}
        generator = torch.Generator().manual_seed(settings["seed"])
        try:
            snippets = self.bank.interpolate(first, second, frames, method, generator)
        except ValueError:
            raise refusal(f"There is no path of the kind {method} between these two memories.") from None
        note = f"From memory {first} to memory {second} ({method}), all from the same noise."
        return self.draw(progress, frames, note, memory=snippets, same_noise=True, **sampling)

    def vary(self, progress: gr.Progress, *, image: PIL.Image.Image | None, count: int, **sampling) -> str:
        image = needed(image, NO_IMAGE)
        note = "From the features of your image, which are in no bank and are not kept."
        if self.bank is not None:
            near = self.pipe.explain(image, min(3, len(self.bank)))
            near = ", ".join(f"{memory['index']} ({memory['score']:.2f})" for memory in near)
            note += f" The nearest memories of the bank, with their similarity: {near}."
        return self.draw(progress, count, note, image=image, num_images_per_memory=count, **sampling)

    # What they are made of

    def sample(
        self, progress: gr.Progress, count: int, *, steps: int, seed: int, same_noise: bool = False, **arguments
    ) -> GMemPipelineOutput:
        arguments.pop("random_seed", None)
        seeds = [seed if same_noise else (seed + k) % (MAX_SEED + 1) for k in range(count)]
        if "guidance" in arguments:
            arguments["guidance_scale"] = arguments.pop("guidance")

        def report(pipe: GMemPipeline, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
            progress((index + 1, pipe.num_timesteps), desc="Drawing", unit="steps")
            return {}

        return self.pipe(
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=report,
            **arguments,
        )

    def preview(self, progress: gr.Progress, rows: list[int]) -> list[PIL.Image.Image]:
        """Images of memories from the same noise, in few steps: without the noise that an SDE adds in each."""
        scheduler = self.pipe.scheduler
        if isinstance(scheduler, GMemFlowMatchScheduler):
            self.pipe.scheduler = GMemFlowMatchScheduler.from_config(scheduler.config, stochastic=False, solver="heun")
        try:
            settings = {"steps": PREVIEW_STEPS, "seed": 0, "same_noise": True}
            return self.sample(progress, len(rows), memory_indices=rows, **settings).images
        finally:
            self.pipe.scheduler = scheduler

    def draw(self, progress: gr.Progress, count: int, note: str = "", **arguments) -> str:
        """Images with what they are made from, which their PNG files tell too."""
        output = self.sample(progress, count, **arguments)
        figures = []
        for k, (image, provenance) in enumerate(zip(output.images, output.provenance, strict=True)):
            # At the ends of a path one of two has no part in it
            sources = [source for source in provenance["sources"] if source["weight"] != 0]
            if sources[0].get("index") is None:
                name, details = "Your image", []
            elif len(sources) == 1:
                name, details = f"Memory {sources[0]['index']}", facts(sources[0])
            else:
                name = " + ".join(f"{source['weight']:.2f} \u00d7 memory {source['index']}" for source in sources)
                details = [line for source in sources for line in facts(source)[:1]]
            rows = [str(source["index"]) for source in sources if source.get("index") is not None]
            filename = "-".join(["gmem", *rows, "seed", str(provenance["seed"])])
            lines = [name, *details, f"seed {provenance['seed']}"]
            figures.append(figure(image, name, lines, f"{filename}.png", output.png_metadata(k)))
        return images_html(figures, note)

    def memory_numbers(self, text: str) -> list[int]:
        numbers = re.split(r"[\s,;]+", text.strip(" ,;"))
        last = len(self.bank) - 1
        if not all(re.fullmatch(r"\d{1,12}", number) and int(number) <= last for number in numbers):
            raise refusal(f"Memory numbers have to be whole numbers from 0 to {last}, with commas between them.")
        return [int(number) for number in numbers]

    def label_name(self, label: int) -> str:
        return (self.bank.id2label or {}).get(label, f"class {label}")

    @property
    def has_thumbnails(self) -> bool:
        return self.bank.metadata is not None and THUMBNAIL in self.bank.metadata.column_names

    def thumbnail(self, row: int) -> PIL.Image.Image | None:
        """The image of a memory, where the bank's metadata holds one (the bytes of a PNG, JPEG or WebP file)."""
        content = self.bank.metadata[THUMBNAIL][row].as_py() if self.has_thumbnails else None
        try:
            return None if content is None else decode_image(content).convert("RGB")
        except (gr.Error, OSError) as error:
            logger.warning(f"The thumbnail of memory {row} cannot be shown: {error}")
            return None

    def about(self) -> str:
        pipe, bank = self.pipe, self.bank
        size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
        unknown = "not recorded"
        facts = {
            "Model": self.name,
            "Licence of the model": self.license or unknown,
            "Images": f"{size} x {size} pixels",
            "Network": f"{parameters:,} parameters",
            "Memory bank": "none" if bank is None else f"{len(bank):,} memories of dimension {bank.dim}",
        }
        if bank is not None:
            facts |= {
                "Fingerprint of the bank": f"`{bank.fingerprint}`",
                "Image encoder of the bank": publishable(bank.encoder) or unknown,
                "Source of the bank": publishable(bank.source_dataset) or unknown,
                "Licence of the source": self.bank_license or unknown,
            }
        rows = "\n".join(f"| {name} | {html.escape(str(value))} |" for name, value in facts.items())
        return (
            f"| | |\n| --- | --- |\n{rows}\n\n"
            "An image resembles the training image whose memory it was drawn from, in content and often in layout: look at "
            "its source before you call it new. Images that you upload are encoded in the server's working memory, are not "
            "written to a file, and are shown to nobody else.\n\n"
            "Made with [diffusers](https://huggingface.co/docs/diffusers), after "
            "[GMem](https://huggingface.co/papers/2412.08781)."
        )

    def bank_card(self) -> str:
        """What the card of the bank says about its contents and how it was made."""
        card = memory_bank_card(self.bank, self.name, self.bank_license).content
        return re.search(r"## What it holds.*?(?=## Removing an entry)", card, re.DOTALL)[0]


def facts(source: dict[str, Any]) -> list[str]:
    """What a bank knows of a memory (`describe_rows`), a line each; its class first."""
    lines = [source.get("label_name") or f"class {source['label']}"] if "label" in source else []
    known = {name: value for name, value in source.items() if name not in ("index", "label", "label_name", "weight")}
    lines += [f"{name}: {value}" for name, value in known.items() if value is not None]
    return [line[:MAX_TEXT] for line in lines]


def needed(value: Any, sentence: str) -> Any:
    if not value:
        raise refusal(sentence)
    return value


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show a GMem pipeline as a web page.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=str,
        default=os.environ.get("GMEM_MODEL", DEFAULT_MODEL),
        help="Folder of a pipeline or its repository on the Hub; the environment variable GMEM_MODEL sets the default.",
    )
    parser.add_argument("--port", type=int, help="Port to listen on; by default the first free one from 7860.")
    return parser.parse_args(input_args)


def open_pipeline(model: str) -> Demo:
    if model == DEFAULT_MODEL and not Path(model).is_dir():
        sys.exit(
            f"There is no pipeline in {DEFAULT_MODEL} yet: run `make quickstart` first, or say which one to show with "
            "`--model` (a folder or a repository of the Hub); on a Space, with the variable GMEM_MODEL."
        )
    try:
        pipe = GMemPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
        bank_repo = (pipe.config.memory_bank_source or {}).get("repo_id")
        bank_license = None if bank_repo is None else license_of(bank_repo, "dataset")
        name = Path(model).resolve().name if Path(model).is_dir() else model
        return Demo(pipe, name, license_of(model, "model"), bank_license)
    except (OSError, ValueError) as error:
        sys.exit(f"The pipeline {model} cannot be shown: {error}")


def license_of(name: str, repo_type: str) -> str | None:
    """What the card in a folder or a repository says, if there is one."""
    try:
        card = Path(name, "README.md") if Path(name).is_dir() else HubRepo(name, repo_type).download("README.md")
        return RepoCard.load(card).data.to_dict().get("license")
    except (OSError, ValueError):
        return None


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    page = open_pipeline(args.model).build()
    # One image generator: what is asked for meanwhile waits
    page.queue(default_concurrency_limit=1, max_size=MAX_WAITING)
    page.launch(
        server_port=args.port,
        theme=gr.themes.Default(font=FONTS, font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]),
        css=CSS,
        # Nothing but our own sentences
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=["gradio", "settings"],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(LimitedRequests)]},
    )


if __name__ == "__main__":
    main(parse_args())
