# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""What made an image, as a text of its PNG file."""

import base64
import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import PIL.Image
import torch
from PIL.PngImagePlugin import PngInfo


PROVENANCE_KEY = "gmem"  # keyword of the PNG's text
PROVENANCE_VERSION = 1

_DTYPES = {"float32": torch.float32, "uint8": torch.uint8}


def read_provenance(path: str | Path) -> dict[str, Any]:
    """
    What a PNG of [`GMemPipelineOutput.save_images`] says of how it was made: see [`GMemPipelineOutput`].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not such a PNG, or was made by a later version.
    """
    path = Path(path)
    try:
        with PIL.Image.open(path) as image:
            text = getattr(image, "text", {}).get(PROVENANCE_KEY)
        provenance = None if text is None else json.loads(text)
    except (PIL.UnidentifiedImageError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a PNG of this pipeline: {error}") from error
    if not isinstance(provenance, dict):
        raise ValueError(f"{path} does not say how it was made: a PNG with the text {PROVENANCE_KEY!r} does.")
    if provenance.get("format_version") != PROVENANCE_VERSION:
        raise ValueError(
            f"{path} says how it was made in the format {provenance.get('format_version')!r}; known is "
            f"{PROVENANCE_VERSION}."
        )
    return provenance


def call_arguments(provenance: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments with which a pipeline makes an image again, beside those that were made in the same call (their initial
    noise can be that of one generator): `pipe(**call_arguments(provenance)).images[provenance["image"]]`.
    """
    arguments = dict(provenance["settings"])
    arguments["guidance_interval"] = tuple(arguments["guidance_interval"])
    batch_size = provenance["batch_size"]
    rows = {"memory": batch_size // arguments["num_images_per_memory"]}
    for name, tensor in provenance["tensors"].items():
        # Those of the other images of the call do not matter to this one
        tensor = _decode_tensor(tensor)
        arguments[name] = tensor.expand(rows.get(name, batch_size), *tensor.shape)
    generator = provenance["generator"]
    if isinstance(generator, list):
        arguments["generator"] = [_restore_generator(record) for record in generator]
    else:
        arguments["generator"] = _restore_generator(generator)
    return arguments


def png_info(provenance: dict[str, Any]) -> PngInfo:
    """The provenance as text for a PNG, in ASCII."""
    info = PngInfo()
    info.add_text(PROVENANCE_KEY, json.dumps(provenance))
    return info


def describe_generator(generator: torch.Generator) -> dict[str, Any]:
    """Its device and seed; and its state, unless it has not drawn anything yet."""
    seed, state = generator.initial_seed(), generator.get_state()
    is_new = torch.equal(state, torch.Generator(generator.device).manual_seed(seed).get_state())
    return {"device": generator.device.type, "seed": seed, "state": None if is_new else encode_tensor(state)}


def _restore_generator(record: dict[str, Any]) -> torch.Generator:
    generator = torch.Generator(record["device"]).manual_seed(record["seed"])
    if record["state"] is not None:
        generator.set_state(_decode_tensor(record["state"]))
    return generator


def encode_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """A float32 or uint8 tensor for JSON, to the bit."""
    data = base64.b64encode(tensor.detach().cpu().numpy().tobytes()).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "base64": data}


def _decode_tensor(record: dict[str, Any]) -> torch.Tensor:
    data = bytearray(base64.b64decode(record["base64"]))
    return torch.frombuffer(data, dtype=_DTYPES[record["dtype"]]).reshape(record["shape"])


def publishable(value: Any) -> Any:
    """A value for JSON that tells nothing of this machine: of absolute paths only the last part is left."""
    if isinstance(value, dict):
        return {str(key): publishable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [publishable(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    for path in (PurePosixPath(str(value)), PureWindowsPath(str(value))):
        if path.is_absolute():
            return path.name
    return str(value)
