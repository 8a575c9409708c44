# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import DIM, MAX_LENGTH, fit, make_image_processor, make_model, make_tokenizer
from tiny_pipeline import make_picture
from transformers import CLIPTextModel, CLIPTextModelWithProjection, SiglipTextModel

from diffusers_gmem.data import encode_text_keys
from diffusers_gmem.models.memory_bank import GMemMemoryBank


PROMPTS = ["a red mug", "two dogs", "the sea at night", "a cat on a mat", "snow", "an old tree", "z"]
LABELS = [0, 0, 1, 1, 2, 2, 2]
MODEL = {"model": "org/clip", "revision": "abc", "model_type": "clip"}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_bank(count=7, seed=0, dtype=torch.float32, **kwargs):
    bank = GMemMemoryBank(
        normal(count, 6, seed=seed), LABELS[:count], {"file": [f"{seed}_{k}.png" for k in range(count)]}, **kwargs
    )
    return bank.with_text_keys(normal(count, 4, seed=100 + seed).to(dtype), **MODEL)


def reopen(bank, folder, **kwargs):
    bank.save_pretrained(folder, **kwargs)
    opened = GMemMemoryBank.from_pretrained(folder)
    opened.verify()
    assert torch.equal(opened[:], bank[:]) and opened.fingerprint == bank.fingerprint
    assert torch.equal(opened.text_keys, bank.text_keys) and opened.text_keys.dtype == bank.text_keys.dtype
    assert opened.text_model == bank.text_model and opened.history == bank.history
    return opened


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request):
    return fit(make_model(request.param), PROMPTS, [make_picture(k) for k in range(7)])


@pytest.fixture
def keyed_bank(model):
    """Row k is of picture k, and prompt k has the embedding of picture k."""
    processor = make_image_processor(model.config.model_type)
    pixel_values = processor(images=[make_picture(k) for k in range(7)], return_tensors="pt").pixel_values
    keys = encode_text_keys(model, pixel_values)
    return GMemMemoryBank(normal(7, 6), LABELS).with_text_keys(keys, "org/x", None, model.config.model_type)


def text_half(model):
    """The text half of a model as a model of its own."""
    cls = SiglipTextModel if model.config.model_type == "siglip" else CLIPTextModelWithProjection
    half = cls(model.config.text_config).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("text_")}
    if cls is SiglipTextModel:
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    missing = half.load_state_dict(weights, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    return half


# Search


@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
def test_search_finds_the_row_of_the_text(model, keyed_bank, half):
    encoder = text_half(model) if half else model
    scores, rows = keyed_bank.search_text(PROMPTS, 7, encoder, make_tokenizer())
    assert scores.shape == rows.shape == (7, 7) and rows[:, 0].tolist() == list(range(7))
    torch.testing.assert_close(scores[:, 0], torch.ones(7), rtol=0, atol=1e-5)
    keys = torch.nn.functional.normalize(keyed_bank.text_keys, dim=1)
    torch.testing.assert_close(scores, (keys @ keys.T).sort(descending=True).values, rtol=0, atol=1e-4)
    one_scores, one_rows = keyed_bank.search_text(PROMPTS[3], 2, encoder, make_tokenizer())
    assert one_rows.tolist() == rows[3, :2].tolist()
    torch.testing.assert_close(one_scores, scores[3, :2])


def test_the_length_of_keys_does_not_matter_and_ties_go_by_row(model, keyed_bank):
    keys = keyed_bank.text_keys
    stretched = keyed_bank.with_text_keys(torch.cat([keys[:5], keys[[1, 0]]]) * torch.arange(1, 8)[:, None])
    doubled = keyed_bank.with_text_keys(keys[[4, 1, 1, 4, 1, 0, 2]])
    assert stretched.search_text(PROMPTS[2], 1, model, make_tokenizer())[1].tolist() == [2]
    scores, rows = doubled.search_text(PROMPTS[1], 3, model, make_tokenizer())
    assert rows.tolist() == [1, 2, 4] and scores[0] == scores[2]


def test_search_after_edits(model, keyed_bank):
    def search(bank, prompt):
        return bank.search_text(prompt, 1, model, make_tokenizer())[1].item()

    assert search(keyed_bank.without([0, 2]), PROMPTS[3]) == 1
    assert search(keyed_bank.select([6, 3, 1]), PROMPTS[1]) == 2
    assert search(keyed_bank.select([6, 5]).merge(keyed_bank.without([5, 6])), PROMPTS[0]) == 2
    extended = keyed_bank.without([4]).extend(normal(6), [0], text_keys=keyed_bank.text_keys[4])
    assert search(extended, PROMPTS[4]) == 6
    assert search(keyed_bank.without([0]).compress(dtype="int8"), PROMPTS[6]) == 5
    # What is removed is not found any more
    assert 4 not in keyed_bank.select([4, 1, 4]).without([0, 2]).search_text(PROMPTS[4], 1, model, make_tokenizer())[1]


def test_a_text_that_is_too_long_is_cut_off_with_a_warning(model, keyed_bank, caplog):
    fits, too_long = "a" * (MAX_LENGTH - 2), "b" * (MAX_LENGTH - 1)  # and two tokens at the ends
    scores, _ = keyed_bank.search_text([fits, too_long], 7, model, make_tokenizer())
    assert f"{too_long!r} is cut off: it has {MAX_LENGTH + 1} tokens, and the text encoder takes 20." in caplog.text
    assert fits not in caplog.text
    assert torch.equal(scores[1], keyed_bank.search_text([fits, too_long + "b"], 7, model, make_tokenizer())[0][1])


@pytest.mark.parametrize(
    ("text", "k", "error", "message"),
    [
        ([], 1, ValueError, "`text` is an empty list"),
        (["a", 3], 1, TypeError, r"`text` has to be a text or a list of them, but is \['a', 3\]"),
        ("a", 8, ValueError, "`k` is 8, but accepted is 1 to 7"),
        ("a", 0, ValueError, "`k` is 0, but accepted is 1 to 7"),
    ],
)
def test_wrong_searches(model, keyed_bank, text, k, error, message):
    with pytest.raises(error, match=message):
        keyed_bank.search_text(text, k, model, make_tokenizer())


def test_text_encoders_that_do_not_fit():
    model, tokenizer = make_model("clip"), make_tokenizer()
    bank = GMemMemoryBank(normal(3, 6))
    with pytest.raises(ValueError, match=r"this bank has no text keys.*build_memory_bank.py --text_keys <model>"):
        bank.search_text("a", 1, model, tokenizer)
    message = "a CLIPModel, is of .*'dim': 12.*, but the text keys of this bank are of .*'dim': 5.* that of org/clip"
    with pytest.raises(ValueError, match=message):
        bank.with_text_keys(normal(3, 5), **MODEL).search_text("a", 1, model, tokenizer)
    with pytest.raises(ValueError, match="'type': 'clip'.*'type': 'siglip'.*the model that made them"):
        bank.with_text_keys(normal(3, DIM), model_type="siglip").search_text("a", 1, model, tokenizer)
    # Its outputs have the size of keys, but are no embeddings
    without_projection = CLIPTextModel(model.config.text_config)
    keys = normal(3, model.config.text_config.hidden_size)
    with pytest.raises(ValueError, match="a CLIPTextModel, whose outputs cannot be compared.*CLIPTextModelWithProj"):
        bank.with_text_keys(keys, **MODEL).search_text("a", 1, without_projection, tokenizer)


# Keys and rows


def test_keys_change_nothing_else(tmp_path):
    plain = GMemMemoryBank(normal(7, 6), LABELS)
    bank = plain.with_text_keys(normal(7, 4), **MODEL)
    assert plain.text_keys is None and plain.text_model is None
    assert bank.fingerprint == plain.fingerprint and bank.history == [] and torch.equal(bank[:], plain[:])
    assert bank.text_model == {"name": "org/clip", "revision": "abc", "type": "clip", "dim": 4}
    assert "with text keys" in repr(bank) and "with text keys" not in repr(plain)
    bank.text_keys.zero_()
    assert torch.equal(bank.text_keys, normal(7, 4))
    assert bank.with_text_keys(normal(7, 5)).text_model == {"name": None, "revision": None, "type": None, "dim": 5}

    plain.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["text_model"] is None and config["files"]["text_keys"] == []
    # Banks that were saved before there were text keys
    del config["text_model"], config["files"]["text_keys"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    opened = GMemMemoryBank.from_pretrained(tmp_path / "plain")
    opened.verify()
    assert opened.text_keys is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_and_open(dtype, tmp_path):
    opened = reopen(make_bank(dtype=dtype), tmp_path, max_shard_size=3 * 24)
    names = sorted(path.name for path in tmp_path.glob("*text_keys*"))
    assert len(names) == 3 and all(
        re.fullmatch(r"memory_bank-text_keys-0000\d-of-00003-\w{8}\.safetensors", n) for n in names
    )
    assert not opened.has_additions and make_bank().has_additions
    assert (
        reopen(opened.select([3, 0]), tmp_path).text_keys.tolist() == make_bank(dtype=dtype).text_keys[[3, 0]].tolist()
    )
    assert len(list(tmp_path.glob("*text_keys*"))) == 1  # the old ones are gone


def test_wide_keys_make_smaller_shards(tmp_path):
    GMemMemoryBank(normal(6, 2)).with_text_keys(normal(6, 10)).save_pretrained(tmp_path, max_shard_size=80)
    assert len(list(tmp_path.glob("*text_keys-*-of-00003-*"))) == len(list(tmp_path.glob("memory_bank-0*"))) == 3


def test_edits_keep_keys_aligned(tmp_path):
    bank = reopen(make_bank(), tmp_path / "a", max_shard_size=3 * 24)
    keys = bank.text_keys
    for edited, expected in (
        (bank.select([6, 0, -2, 0]), keys[[6, 0, 5, 0]]),
        (bank.without(labels=1).without([0]), keys[[1, 4, 5, 6]]),
        (bank.extend(normal(2, 6), [0, 1], text_keys=normal(2, 4)), torch.cat([keys, normal(2, 4)])),
        (bank.extend(normal(6), [0], text_keys=normal(4)), torch.cat([keys, normal(1, 4)])),
        (bank.select([5, 1]).merge(make_bank(3, seed=1)), torch.cat([keys[[5, 1]], normal(3, 4, seed=101)])),
        (bank.select([5, 1, 0]).compress(rank=2), keys[[5, 1, 0]]),
        (bank.without([3]).compress(dtype="int8").without([0]), keys[[1, 2, 4, 5, 6]]),
    ):
        assert torch.equal(edited.text_keys, expected) and edited.text_model == bank.text_model
        reopen(edited, tmp_path / "b", max_shard_size=2 * 24)
    assert torch.equal(bank.text_keys, keys)


def test_extend_and_merge_cast_to_the_dtype_of_the_keys():
    bank = make_bank(dtype=torch.float16)
    assert torch.equal(bank.extend(normal(1, 6), [0], text_keys=normal(1, 4)).text_keys[7:], normal(1, 4).half())
    merged = bank.merge(make_bank(3, seed=1))
    assert merged.text_keys.dtype == torch.float16
    assert torch.equal(merged.text_keys[7:], normal(3, 4, seed=101).half())


def test_removed_keys_are_in_no_file(tmp_path):
    bank = reopen(make_bank(), tmp_path / "a")
    bank.without([2, 3, 5]).save_pretrained(tmp_path / "b")
    bank.without([2, 3, 5]).save_pretrained(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "b"):
        content = b"".join(path.read_bytes() for path in folder.iterdir())
        for row, key in enumerate(make_bank().text_keys):
            assert (key.numpy().tobytes() in content) == (row not in (2, 3, 5))


def test_some_rows_need_only_their_files(tmp_path):
    make_bank().save_pretrained(tmp_path, max_shard_size=2 * 24)
    for path in tmp_path.glob("memory_bank-*0000[134]-of*"):
        path.unlink()
    some = GMemMemoryBank.from_pretrained(tmp_path, indices=[2, 1])
    some.verify()
    assert torch.equal(some.text_keys, make_bank().text_keys[[2, 1]])
    assert torch.equal(GMemMemoryBank.from_pretrained(tmp_path, indices=1).text_keys, make_bank().text_keys[[1]])
    (path,) = tmp_path.glob("memory_bank-text_keys-*")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        GMemMemoryBank.from_pretrained(tmp_path, indices=[2])


@pytest.mark.parametrize("fault", ["damaged", "not finite", "truncated", "dtype", "order", "rows"])
def test_broken_files(fault, tmp_path):
    make_bank().save_pretrained(tmp_path, max_shard_size=4 * 24)
    _, path = sorted(tmp_path.glob("memory_bank-text_keys-*"))
    content = path.read_bytes()
    if fault == "damaged":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "not finite":
        path.write_bytes(content[:-4] + torch.tensor(torch.nan).numpy().tobytes())
    elif fault == "truncated":
        path.write_bytes(content[:-4])
    elif fault == "dtype":
        save_file({"text_keys": load_file(path)["text_keys"].half()}, path, metadata={"shard": "2 of 2"})
    elif fault == "order":
        save_file(load_file(path), path, metadata={"shard": "1 of 2"})
    else:
        config_path = tmp_path / "config.json"
        config = json.loads(config_path.read_text())
        config["files"]["text_keys"][0]["rows"] += 1
        config["files"]["text_keys"][1]["rows"] -= 1
        config_path.write_text(json.dumps(config))
        path = config_path
    messages = {
        "rows": "do not have as many rows as those of the snippets",
        "order": "out of order",
        "not finite": "row 6 of",
    }
    with pytest.raises(ValueError, match=f"{path}.*{messages.get(fault, fault)}"):
        GMemMemoryBank.from_pretrained(tmp_path).verify()


@pytest.mark.parametrize(
    "change", [{"text_model": None}, {"files": {"text_keys": []}}, {"text_model": {"dtype": "int9"}}]
)
def test_config_and_files_have_to_agree_on_the_keys(change, tmp_path):
    make_bank().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        config[name] = value if value is None else config[name] | value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is broken: `text_model` is"):
        GMemMemoryBank.from_pretrained(tmp_path)


def test_keys_that_were_added_to_an_opened_bank_leave_its_files_to_be_verified(tmp_path):
    GMemMemoryBank(normal(7, 6), LABELS).save_pretrained(tmp_path)
    bank = GMemMemoryBank.from_pretrained(tmp_path).with_text_keys(normal(7, 4))
    bank.verify()
    bank.save_pretrained(tmp_path, max_shard_size=3 * 24)
    bank = GMemMemoryBank.from_pretrained(tmp_path).with_text_keys(normal(7, 5))
    bank.verify()
    assert bank.has_additions
    path = min(tmp_path.glob("memory_bank-0*"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        bank.verify()


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda bank: bank.with_text_keys([[1.0]]), TypeError, "`text_keys` has to be a torch.Tensor"),
        (lambda bank: bank.with_text_keys(normal(6, 4)), ValueError, "`text_keys` has to have 7 rows, but has 6"),
        (lambda bank: bank.with_text_keys(torch.ones(7)), ValueError, r"`text_keys` has to be of shape \(N, K\)"),
        (lambda bank: bank.with_text_keys(torch.full((7, 4), torch.nan)), ValueError, "finite, but row 0"),
        (
            lambda bank: bank.extend(normal(6), [0]),
            ValueError,
            "`text_keys` is None, but this bank has text keys: give",
        ),
        (
            lambda bank: bank.extend(normal(6), [0], text_keys=normal(5)),
            ValueError,
            r"shape \(1, 4\), but is .*\(1, 5\)",
        ),
        (
            lambda bank: bank.extend(normal(6), [0], text_keys=normal(2, 4)),
            ValueError,
            r"shape \(1, 4\), but is .*\(2, 4\)",
        ),
        (
            lambda bank: bank.merge(GMemMemoryBank(normal(2, 6), [0, 1])),
            ValueError,
            "`other` has the text_model None, but",
        ),
        (
            lambda bank: GMemMemoryBank(normal(1, 6)).extend(normal(6), text_keys=normal(4)),
            ValueError,
            "`text_keys` is .*, but this bank has none",
        ),
        (
            lambda bank: bank.merge(bank.with_text_keys(bank.text_keys, "org/other")),
            ValueError,
            "text_model .*org/other.*but this bank has .*org/clip",
        ),
    ],
)
def test_wrong_keys(edit, error, message):
    with pytest.raises(error, match=message):
        edit(make_bank())
