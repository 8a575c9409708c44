import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from diffusers_gmem import GMemFlowMatchScheduler, GMemMemoryBank, GMemPipeline, GMemTransformer2DModel
from diffusers_gmem.data import ImageSource, compute_snippets


SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "show_results.py"


def test_pictures_and_report(tmp_path, capsys):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    spec = importlib.util.spec_from_file_location("show_results", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("held_out", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    encoder = Dinov2Model(config).eval()
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    source = ImageSource(str(tmp_path / "train"), cache_dir=str(tmp_path / "cache"))
    pipe = GMemPipeline(
        GMemTransformer2DModel(
            sample_size=8,
            patch_size=4,
            in_channels=3,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            memory_dim=16,
            alignment_layer=None,
        ),
        GMemFlowMatchScheduler(),
        memory_bank=GMemMemoryBank(compute_snippets(source, encoder, processor)),
        image_encoder=encoder,
        image_processor=processor,
    )
    pipe.save_pretrained(tmp_path / "pipeline")

    command = ["--pipeline", str(tmp_path / "pipeline"), "--output", str(tmp_path / "out" / "pictures.png")]
    command += ["--train_data_dir", str(tmp_path / "train"), "--held_out_dir", str(tmp_path / "held_out")]
    command += ["--cache_dir", str(tmp_path / "cache"), "--num_images", "3", "--num_retrievals", "5"]
    script.main(script.parse_args([*command, "--num_inference_steps", "2"]))

    sheet = np.asarray(PIL.Image.open(tmp_path / "out" / "pictures.png"))
    assert sheet.shape == (6 * (24 + 96 + 4) + 4, 4 + 3 * 100, 3)
    # The first tile is the first training image that was drawn, enlarged without smoothing
    drawn = pipe.memory_bank.sample(5, generator=torch.Generator().manual_seed(0))[1]
    tile = np.asarray(source[int(drawn[0])].resize((96, 96), PIL.Image.Resampling.NEAREST))
    assert np.array_equal(sheet[24 : 24 + 96, 4 : 4 + 96], tile)

    report = capsys.readouterr().out
    assert "by chance, for 0.83 (1/6 each)" in report
    # At full resolution every training image finds its own snippet
    assert "shrunk to 8x8 pixels, find their own snippet for 5." in report
    assert str(tmp_path / "pipeline" / "bank") in report
