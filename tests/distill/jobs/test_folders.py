"""Directories as data sets: every token and every image once, nothing in memory but ids."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("PIL", reason="the extra `train` is not installed")

from checkpoints_made import WORDS, images, tokenizer  # noqa: E402

from kdkernels import KDLoss  # noqa: E402
from kdkernels.distill import Distiller  # noqa: E402
from kdkernels.distill.jobs import folders  # noqa: E402


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(text)
    return folder


def test_files_are_found_below_and_sorted(tmp_path):
    write(tmp_path, b="x", a__c="x", a__b="x")
    (tmp_path / "a" / "NOTES.MD").write_text("x")
    (tmp_path / "a" / "x.bin").write_bytes(b"x")
    found = folders.find("data", tmp_path, folders.TEXT, "text files")
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["a/NOTES.MD", "a/b.txt", "a/c.txt", "b.txt"]
    with pytest.raises(ValueError, match=r"must have images \(.png, .*.* has none"):
        folders.find("data", tmp_path, folders.IMAGES, "images")
    with pytest.raises(NotADirectoryError, match="must be a directory, .*b.txt is none"):
        folders.find("data", tmp_path / "b.txt", folders.TEXT, "text files")


@pytest.mark.parametrize(("count", "share", "held"), [(10, 0.2, 2), (3, 0.01, 1), (2, 0.9, 1)])
def test_whole_files_are_held_out(tmp_path, count, share, held):
    files = [tmp_path / str(k) for k in range(count)]
    train, test = folders.held_out(files, share, seed=0)
    assert len(test) == held and sorted(train + test) == sorted(files)
    assert (train, test) == folders.held_out(files, share, seed=0)
    splits = {tuple(folders.held_out(files, share, seed)[1]) for seed in range(20)}
    assert len(splits) > 1


def test_a_single_file_is_not_split(tmp_path):
    with pytest.raises(ValueError, match="two files or more to hold some out, got .*one alone"):
        folders.held_out([tmp_path / "one"], 0.1, seed=0)


def test_every_token_is_predicted_once(tmp_path):
    write(tmp_path, a="the cat sees", b="a dog", c="small old bird likes the red dog")
    files = folders.find("data", tmp_path, folders.TEXT, "text files")
    tokens = tokenizer()
    blocks = folders.TextFolder(files, tokens, 4)
    stream = [token for path in files for token in [*tokens(path.read_text()).input_ids, 1]]
    assert len(stream) == 15 and len(blocks) == 3  # 14 are predicted, 12 in whole blocks
    assert blocks[0]["input_ids"].dtype == torch.int64
    for name, offset in (("input_ids", 0), ("labels", 1)):
        found = torch.cat([blocks[k][name] for k in range(3)])
        assert found.tolist() == stream[offset : 12 + offset]
    assert blocks.largest == max(stream)
    with pytest.raises(IndexError):
        blocks[3]


def test_text_that_is_too_short_or_no_text(tmp_path):
    write(tmp_path, a="the cat")
    files = [tmp_path / "a.txt"]
    assert len(folders.TextFolder(files, tokenizer(), 2)) == 1
    with pytest.raises(ValueError, match="length must be less than the 3 tokens of .*a.txt, got 3"):
        folders.TextFolder(files, tokenizer(), 3)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="b.txt must be UTF-8 text"):
        folders.TextFolder([tmp_path / "b.txt"], tokenizer(), 2)
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an eos_token"):
        folders.TextFolder(files, endless, 2)


def test_worker_processes_read_the_same_blocks(tmp_path):
    write(tmp_path, a=" ".join(WORDS * 4))
    blocks = folders.TextFolder([tmp_path / "a.txt"], tokenizer(), 5)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    curves = []
    for workers in (0, 2):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        options = dict(loss=KDLoss(alpha=0.0), batch_size=4, workers=workers)
        distiller = Distiller(model, None, blocks, **options)
        curves.append(distiller.train(6, record_every=1).losses)
    assert curves[0] == curves[1]


def test_images_and_their_classes(tmp_path):
    images(tmp_path, names=("red", "blue"), count=2)
    files = folders.find("data", tmp_path, folders.IMAGES, "images")
    config = transformers.ViTConfig(image_size=6, id2label={0: "red", 1: "green", 2: "blue"})
    labels = folders.label_ids(["blue", "red"], config)
    assert labels == {"blue": 2, "red": 0}  # by name; nobody has to have seen all classes
    data = folders.ImageFolder(files, labels, folders.transform_of(tmp_path, config))
    assert len(data) == 4 and [data[k]["labels"] for k in range(4)] == [2, 2, 0, 0]
    pixels = data[2]["pixel_values"]  # of (255, 0, 0)
    assert pixels.shape == (3, 6, 6) and pixels.dtype == torch.float32
    assert (pixels[0] == 1).all() and (pixels[1:] == -1).all()
    (tmp_path / "red" / "x.png").write_bytes(b"no image")
    bad = folders.ImageFolder([tmp_path / "red" / "x.png"], labels, None)
    with pytest.raises(ValueError, match="x.png must be an image"):
        bad[0]
    with pytest.raises(ValueError, match="'red' must be one of the classes blue"):
        folders.ImageFolder(files, {"blue": 0}, None)


def test_a_grey_model_gets_one_channel(tmp_path):
    images(tmp_path, count=1)
    config = transformers.ViTConfig(image_size=4, num_channels=1)
    files = folders.find("data", tmp_path, folders.IMAGES, "images")
    data = folders.ImageFolder(files, {"blue": 0, "red": 1}, folders.transform_of("", config))
    assert data[0]["pixel_values"].shape == (1, 4, 4)


def test_the_checkpoints_own_image_processor_is_used(tmp_path):
    processor = transformers.ViTImageProcessorPil(
        size={"height": 5, "width": 5}, image_mean=[0.0] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(tmp_path / "model")
    images(tmp_path / "data", names=("red",), count=1)
    files = folders.find("data", tmp_path / "data", folders.IMAGES, "images")
    transform = folders.transform_of(tmp_path / "model", transformers.ViTConfig(image_size=9))
    pixels = folders.ImageFolder(files, {"red": 0}, transform)[0]["pixel_values"]
    assert pixels.shape == (3, 5, 5)
    torch.testing.assert_close(pixels[0], torch.full((5, 5), 2.0))
    assert transform == folders.transform_of(tmp_path / "model", None)
    assert transform != folders.transform_of(tmp_path, transformers.ViTConfig(image_size=5))


def test_classes_without_names_are_counted():
    config = transformers.ViTConfig(num_labels=2)
    assert folders.label_ids(["ant", "bee"], config) == {"ant": 0, "bee": 1}
    for names in (["ant"], ["ant", "bee", "cow"]):
        with pytest.raises(ValueError, match=f"each of the model's 2 labels, got {len(names)}"):
            folders.label_ids(names, config)
