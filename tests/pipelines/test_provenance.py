# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import pickle

import numpy as np
import PIL.Image
import pyarrow
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from PIL.PngImagePlugin import PngInfo
from tiny_pipeline import (
    ID2LABEL,
    LABELS,
    MEMORY_DIM,
    make_image_encoder,
    make_picture,
    make_pipeline,
    make_transformer,
    quiet,
    run,
    seed,
)

from diffusers_gmem import GMemFlowMatchScheduler, GMemMemoryBank, GMemPipeline, read_provenance
from diffusers_gmem.models.snippet_sources import sources_of


FILES = [f"class/{number}.png" for number in range(len(LABELS))]


def part(index, weight=1.0):
    label = LABELS[index]
    return {
        "file": FILES[index],
        "index": index,
        "label": label,
        "label_name": ID2LABEL[label],
        "weight": weight,
    }


def make_known_bank(files=FILES, **record):
    snippets = torch.randn(len(LABELS), MEMORY_DIM, generator=seed(2))
    return GMemMemoryBank(snippets, labels=LABELS, id2label=ID2LABEL, metadata={"file": files}, **record)


@pytest.fixture(scope="module")
def bank():
    return make_known_bank()


@pytest.fixture
def pipe(bank):
    return make_pipeline(make_transformer(in_channels=3), memory_bank=bank, **make_image_encoder())


# Sources


def test_sources_of_rows(pipe):
    assert run(pipe, memory_indices=[3, 0]).sources == [[part(3)], [part(0)]]
    assert run(pipe, memory_indices=[3, 0], num_images_per_memory=2).sources == [[part(i)] for i in (3, 3, 0, 0)]
    for arguments in ({"num_images": 3}, {"class_labels": ["dog", 2, "cat"]}):
        output = run(pipe, **arguments)
        assert output.sources == [[part(index)] for index in output.memory_indices]


def test_sources_of_a_bank_that_knows_nothing():
    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=GMemMemoryBank(torch.randn(3, MEMORY_DIM)))
    assert run(pipe, memory_indices=2).sources == [[{"index": 2, "weight": 1.0}]]


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_sources_of_an_interpolation(pipe, bank, method):
    output = run(pipe, memory=bank.interpolate(3, 5, num=5, method=method), num_images_per_memory=2)
    expected = [[part(3, 1 - share), part(5, share)] for share in (0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1)]
    assert output.sources == expected
    assert output.memory_indices is None


@pytest.mark.parametrize("method", ["concat", "mask"])
def test_shares_are_those_of_the_entries(method):
    bank = GMemMemoryBank(torch.stack([torch.rand(15) + 1, -torch.rand(15) - 1]))
    memory = bank.interpolate(0, 1, num=4, method=method, generator=seed(0))
    weights = [[source["weight"] for source in sources] for sources in sources_of(memory).describe()]
    first = (memory > 0).double().mean(dim=1)
    np.testing.assert_allclose(weights, torch.stack([first, 1 - first], dim=1))


def test_sources_of_sums(pipe, bank):
    output = run(pipe, memory=bank.mix([1, torch.tensor(2), 3], [1, -1, 0.5]))
    assert output.sources == [[part(1), part(2, -1.0), part(3, 0.5)]]
    for indices in (torch.tensor([1, 4]), slice(1, 5, 3), range(1, 5, 3)):
        assert run(pipe, memory=bank.mix(indices, [0.5, 0.25])).sources == [[part(1, 0.5), part(4, 0.25)]]
    inner = bank.mix([1, 2], [0.5, -0.5])
    assert run(pipe, memory=bank.mix([inner, 3], [0.5, 2])).sources == [[part(1, 0.25), part(2, -0.25), part(3, 2.0)]]
    middle = bank.interpolate(inner, 3, num=3)
    assert run(pipe, memory=middle).sources[1] == [part(1, 0.25), part(2, -0.25), part(3, 0.5)]


def test_what_is_not_known_is_not_claimed(pipe, bank):
    unknown, memory = {"index": None}, bank.interpolate(3, 5, num=3)
    assert run(pipe, memory=bank[[1, 2]]).sources == [None, None]
    assert run(pipe, memory=memory[1:]).sources == [None, None]
    assert run(pipe, memory=memory * 2).sources == [None] * 3
    mixed = bank.mix([bank[1], 2], [0.5, 0.5])
    assert run(pipe, memory=mixed).sources == [[{**unknown, "weight": 0.5}, part(2, 0.5)]]
    of_other_bank = make_known_bank().mix([1, 2], [1, 1])
    assert run(pipe, memory=bank.mix([of_other_bank, 2], [1, 1])).sources == [[{**unknown, "weight": 1.0}, part(2)]]
    memory[1] = bank[0]
    assert run(pipe, memory=memory).sources == [None] * 3
    with torch.inference_mode():
        assert run(pipe, memory=bank.mix([1], [1])).sources == [[part(1)]]


def test_sources_of_images(pipe, bank, tmp_path):
    make_picture().save(tmp_path / "mug.png")
    with PIL.Image.open(tmp_path / "mug.png") as opened:
        output = run(pipe, image=[opened, make_picture(1), np.array(make_picture(2))], num_images_per_memory=2)
        names = ["mug.png"] * 2 + [None] * 4
        assert output.sources == [[{"image": name, "weight": 1.0}] for name in names]
        assert output.memory_indices is None
        mixed = bank.interpolate(pipe.encode_image(opened), 3, num=5)
    assert run(pipe, memory=mixed).sources[1] == [{"image": "mug.png", "weight": 0.75}, part(3, 0.25)]


def test_describe_rows():
    metadata = pyarrow.table(
        {
            "thumbnail": [b"png", b"png"],
            "image": [{"bytes": b"png", "path": "a"}, None],
            "name": ["a", None],
            "index": [7, 7],
        }
    )
    bank = GMemMemoryBank(torch.randn(2, 4), labels=[5, 6], id2label={5: "cat"}, metadata=metadata)
    first, second = (
        {"name": "a", "index": 0, "label": 5, "label_name": "cat"},
        {"name": None, "index": 1, "label": 6},
    )
    assert bank.describe_rows([1, 0]) == [second, first]
    assert bank.describe_rows(-1) == [second]
    assert bank.select([1]).describe_rows(0) == [{**second, "index": 0}]
    with pytest.raises(IndexError, match="row 2"):
        bank.describe_rows(2)


def test_describe_rows_leaves_large_columns_in_the_file(tmp_path):
    metadata = {"name": list("abcd"), "thumbnail": [b"png"] * 4}
    GMemMemoryBank(torch.randn(4, 4), labels=[0, 1, 1, 0], metadata=metadata).save_pretrained(tmp_path / "bank")
    opened = GMemMemoryBank.from_pretrained(tmp_path / "bank")
    edited = opened.without(indices=[1]).extend(torch.randn(1, 4), labels=[2])
    assert [row["name"] for row in edited.describe_rows(slice(None))] == ["a", "c", "d", None]
    assert [row["name"] for row in opened.describe_rows([3, 0])] == ["d", "a"]
    assert "table" not in vars(opened._metadata_parts[0])
    assert edited.metadata["thumbnail"].to_pylist() == [b"png"] * 3 + [None]

    GMemMemoryBank(torch.randn(2, 4), metadata={"thumbnail": [b"png"] * 2}).save_pretrained(tmp_path / "plain")
    assert GMemMemoryBank.from_pretrained(tmp_path / "plain").describe_rows([1]) == [{"index": 1}]


# Made again from the PNG

CALLS = {
    "draws": lambda pipe: {"num_images": 3},
    "classes": lambda pipe: {"class_labels": ["dog", 2], "num_images_per_memory": 2},
    "rows": lambda pipe: {"memory_indices": np.array([3, 4]), "num_images_per_memory": 2},
    "image": lambda pipe: {"image": [make_picture(0), make_picture(1)]},
    "snippets": lambda pipe: {"memory": torch.randn(2, MEMORY_DIM, dtype=torch.float64)},
    "interpolation": lambda pipe: {"memory": pipe.memory_bank.interpolate(0, 6, 3), "num_images_per_memory": 2},
    "generators": lambda pipe: {"class_labels": ["fish"] * 4, "generator": [seed(k) for k in range(4)]},
    "generators per memory": lambda pipe: {
        "class_labels": ["fish"] * 2,
        "num_images_per_memory": 2,
        "generator": [seed(k) for k in range(4)],
    },
    "no generator": lambda pipe: {"num_images": 2, "generator": None},
    "latents": lambda pipe: {"memory_indices": [1, 2], "latents": torch.randn(2, 3, 8, 8)},
    "guidance": lambda pipe: {
        "num_images": 2,
        "guidance_scale": np.float32(2.5),
        "guidance_interval": (0, 0.75),
        "negative_memory": torch.randn(2, MEMORY_DIM),
    },
    "one negative memory": lambda pipe: {
        "memory_indices": [1, 2],
        "guidance_scale": 2,
        "negative_memory": torch.randn(MEMORY_DIM),
    },
    "lists": lambda pipe: {"memory_indices": [1, 2], "output_type": "pt", "num_inference_steps": 2},
}


def check_remade(pipe, output, directory):
    paths = output.save_images(directory)
    assert len(paths) == len(output.images)
    for number, path in enumerate(paths):
        provenance = read_provenance(path)
        assert provenance == output.provenance[number]
        with PIL.Image.open(path) as saved:
            assert saved.format == "PNG"
            assert np.array_equal(pipe.remake(provenance), saved), number
    return paths


@pytest.mark.parametrize("name", CALLS)
def test_made_again_from_the_png(pipe, tmp_path, name):
    output = run(pipe, **{"output_type": "pil", **CALLS[name](pipe)})
    images = [np.array(PIL.Image.open(path)) for path in check_remade(pipe, output, tmp_path)]
    assert not np.array_equal(images[0], images[1])
    if name != "lists":
        assert np.array_equal(images, [np.array(image) for image in output.images])


def test_made_again_in_another_process_of_a_saved_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    loaded = quiet(GMemPipeline.from_pretrained(tmp_path / "saved"))
    path = run(loaded, num_images=2, output_type="pil").save_images(tmp_path)[1]
    provenance = read_provenance(path)
    assert provenance["model"]["name"] == "saved"
    assert provenance["memory_bank"] == pipe.memory_bank.fingerprint
    again = quiet(GMemPipeline.from_pretrained(tmp_path / "saved"))
    assert np.array_equal(again.remake(provenance), PIL.Image.open(path))


def test_made_again_with_a_generator_that_had_drawn(pipe, tmp_path):
    generator = seed(3)
    run(pipe, generator=generator)
    output = run(pipe, num_images=2, generator=generator, output_type="pil")
    assert output.provenance[0]["seed"] == 3
    check_remade(pipe, output, tmp_path)


def test_made_again_with_a_guider_and_another_scheduler(pipe, tmp_path):
    pipe.scheduler = GMemFlowMatchScheduler(solver="euler", stochastic=False, last_step=None)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=3.0)
    output = run(pipe, num_images=2, output_type="pil")
    assert output.provenance[0]["guider"]["guidance_scale"] == 3.0
    assert output.provenance[0]["scheduler"]["solver"] == "euler"
    check_remade(pipe, output, tmp_path)


def test_without_a_generator_the_global_one_decides(pipe):
    images = []
    for number in (0, 0, 1):
        torch.manual_seed(number)
        images.append(run(pipe, generator=None).images)
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_the_record_can_be_followed_by_hand(pipe, tmp_path):
    generators = [seed(10), seed(11)]
    output = run(pipe, memory_indices=[4, 2], generator=generators, output_type="pil", num_inference_steps=4)
    said = read_provenance(output.save_images(tmp_path)[1])
    assert (said["seed"], said["memory_index"], said["image"], said["batch_size"]) == (11, 2, 1, 2)
    assert said["settings"]["num_inference_steps"] == 4
    by_hand = pipe(
        memory_indices=said["memory_index"],
        generator=torch.Generator().manual_seed(said["seed"]),
        num_inference_steps=said["settings"]["num_inference_steps"],
    )
    difference = np.array(by_hand.images[0], dtype=int) - np.array(output.images[1], dtype=int)
    assert np.abs(difference).max() <= 1  # float32 of another batch, rounded to 8 bits


@pytest.mark.parametrize("change", ["tensor", "end"])
def test_what_a_callback_did_cannot_be_made_again(pipe, change):
    def callback(pipe, index, timestep, tensors):
        if change == "end":
            pipe._interrupt = True
            return {}
        return {"latents": tensors["latents"] * 0.5}

    for harmless, function in ((True, lambda pipe, index, timestep, tensors: tensors), (False, callback)):
        provenance = run(pipe, callback_on_step_end=function).provenance[0]
        assert provenance["repeatable"] is harmless
    with pytest.raises(ValueError, match="cannot be made again"):
        pipe.remake(provenance)


def test_a_pipeline_that_makes_another_image_refuses(pipe, bank, warnings):
    drawn = run(pipe).provenance[0]
    given = run(pipe, memory=bank[0]).provenance[0]
    pipe.memory_bank = bank.without(0)
    with pytest.raises(
        ValueError, match=f"memory_bank {bank.fingerprint}; this one is {pipe.memory_bank.fingerprint}"
    ):
        pipe.remake(drawn)
    pipe.remake(given)  # no row of a bank is in it
    pipe.memory_bank = bank
    pipe.guider = ClassifierFreeGuidance()
    with pytest.raises(ValueError, match="the guider None"):
        pipe.remake(drawn)
    pipe.guider = None
    assert not warnings.records or "made with" not in warnings.text
    pipe.transformer.to(torch.bfloat16)
    pipe.remake(drawn)
    assert "'dtype': 'float32'" in warnings.text and "'dtype': 'bfloat16'" in warnings.text
    pipe.scheduler = GMemFlowMatchScheduler(shift=2.0)
    with pytest.raises(ValueError, match="the scheduler"):
        pipe.remake(drawn)


# Files


def test_nothing_of_this_machine_gets_into_the_file(tmp_path):
    folder = tmp_path / "secret"
    bank = make_known_bank([f"{folder}/{number}.png" for number in range(len(LABELS))], encoder=str(folder / "dino"))
    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=bank, **make_image_encoder())
    pipe.save_pretrained(folder / "model")
    loaded = quiet(GMemPipeline.from_pretrained(folder / "model"))
    make_picture().save(folder / "mug.png")
    outputs = [run(loaded, output_type="pil"), run(loaded, image=PIL.Image.open(folder / "mug.png"))]
    outputs.append(run(loaded, memory=bank.interpolate(0, 1, 2)))
    for number, output in enumerate(outputs):
        for path in output.save_images(tmp_path / "images", prefix=f"call{number}"):
            assert b"secret" not in path.read_bytes() and b"/tmp" not in path.read_bytes()
    said = [read_provenance(tmp_path / f"images/call{number}-00000.png") for number in range(3)]
    assert [source["sources"][0].get("file", source["sources"][0].get("image")) for source in said] == [
        f"{said[0]['memory_index']}.png",
        "mug.png",
        "0.png",
    ]


def test_windows_paths_and_dates_are_published_harmlessly(tmp_path):
    metadata = pyarrow.table({"file": ["C:\\me\\cat.png"], "day": pyarrow.array([0], pyarrow.date32())})
    pipe = make_pipeline(
        make_transformer(in_channels=3), memory_bank=GMemMemoryBank(torch.randn(1, MEMORY_DIM), metadata=metadata)
    )
    (path,) = run(pipe).save_images(tmp_path)
    assert read_provenance(path)["sources"] == [{"file": "cat.png", "day": "1970-01-01", "index": 0, "weight": 1.0}]


def test_a_call_does_not_compute_the_fingerprint(pipe, bank):
    edited = make_known_bank().without([0])
    pipe.memory_bank = edited
    output = run(pipe, memory_indices=[2])
    run(pipe, image=make_picture())
    assert "fingerprint" not in vars(edited)
    (provenance,) = output.provenance
    assert provenance["memory_bank"] == edited.fingerprint != bank.fingerprint
    assert output.provenance is output.provenance


def test_the_provenance_is_of_the_time_of_the_call(pipe):
    snippets, latents = torch.ones(1, MEMORY_DIM), torch.ones(1, 3, 8, 8)
    first = run(pipe, memory=snippets, latents=latents)
    again = pickle.loads(pickle.dumps(run(pipe, memory=snippets, latents=latents))).provenance
    snippets.zero_(), latents.zero_()
    pipe.scheduler = GMemFlowMatchScheduler(solver="heun")
    pipe.memory_bank = None
    assert first.provenance == again


def test_png_metadata(pipe, tmp_path):
    output = run(pipe, num_images=2, output_type="pil")
    output.images[1].save(tmp_path / "own.png", pnginfo=output.png_metadata(1))
    with PIL.Image.open(tmp_path / "own.png") as image:
        assert json.loads(image.text["gmem"]) == output.provenance[1]
    assert read_provenance(tmp_path / "own.png")["memory_index"] == output.memory_indices[1]


def test_files_are_replaced_as_a_whole(pipe, tmp_path):
    output = run(pipe, num_images=2, output_type="pil")
    paths = output.save_images(tmp_path / "new" / "folder", prefix="cat")
    assert [path.name for path in paths] == ["cat-00000.png", "cat-00001.png"]
    before = [path.read_bytes() for path in paths]

    other = run(pipe, num_images=2, output_type="pil", generator=seed(1))

    def fail(file, **kwargs):
        file.write_bytes(b"half")
        raise OSError("disk full")

    other.images[1].save = fail
    with pytest.raises(OSError, match="disk full"):
        other.save_images(tmp_path / "new" / "folder", prefix="cat")
    assert paths[0].read_bytes() != before[0]
    assert paths[1].read_bytes() == before[1]


def test_latents_are_no_images(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"Latents of shape \(1, 3, 8, 8\)"):
        run(pipe, output_type="latent").save_images(tmp_path)


def test_files_that_say_nothing(tmp_path):
    picture = make_picture()
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no image")
    for name, text in (("later", '{"format_version": 2}'), ("broken", "{"), ("list", "[1]")):
        info = PngInfo()
        info.add_text("gmem", text)
        picture.save(tmp_path / f"{name}.png", pnginfo=info)
    for name in ("plain.png", "photo.jpg", "list.png"):
        with pytest.raises(ValueError, match=f"{name} does not say"):
            read_provenance(tmp_path / name)
    for name in ("text.png", "broken.png"):
        with pytest.raises(ValueError, match=f"{name} is not a PNG of this pipeline"):
            read_provenance(tmp_path / name)
    with pytest.raises(ValueError, match="later.png .* format 2; known is 1"):
        read_provenance(tmp_path / "later.png")
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        read_provenance(tmp_path / "nothing.png")


# What an image is like


def test_explain(pipe, bank):
    pictures = [make_picture(number) for number in range(3)]
    snippets = pipe.encode_image(pictures)
    known = GMemMemoryBank(torch.cat([bank[:4], 3 * snippets[1:2]]), metadata={"file": FILES[:5]})
    pipe.memory_bank = known
    found = pipe.explain(pictures[1], k=3)
    assert found[0]["index"] == 4 and found[0]["file"] == FILES[4] and found[0]["score"] == pytest.approx(1)
    scores, rows = known.nearest(snippets[1], 3)
    assert [entry["index"] for entry in found] == rows.tolist()
    assert [entry["score"] for entry in found] == pytest.approx(scores.tolist(), abs=1e-6)
    several = pipe.explain(pictures, k=3)
    assert len(several) == 3 and [entry["index"] for entry in several[1]] == rows.tolist()
    by_product = pipe.explain(pictures[1], k=5, metric="dot")
    assert [entry["index"] for entry in by_product] == known.nearest(snippets[1], 5, "dot")[1].tolist()
    assert len(pipe.explain(pictures[0])) == 5


def test_explain_needs_a_bank_and_an_encoder(pipe):
    with pytest.raises(ValueError, match="`k` is 8"):
        pipe.explain(make_picture(), k=8)
    pipe.memory_bank = None
    with pytest.raises(ValueError, match="no memory bank"):
        pipe.explain(make_picture())
    with pytest.raises(ValueError, match="image_encoder"):
        make_pipeline(memory_bank=make_known_bank()).explain(make_picture())
