"""Text embeddings: CLIP's text tower from a folder, files, random ones, and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from semiseg.config import load_config
from semiseg.engine.trainer import build_method, choose_device
from semiseg.methods import VCLIPSeg
from semiseg.models.folding import fold_batch_norm
from semiseg.text import TextEmbeddings, class_prompts, clip_text, file_text, random_text

PROMPTS = ["A pixel of background", "A pixel of left atrium"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP text model with random weights and a tokenizer of letters and two merges."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    endings = [f"{letter}</w>" for letter in ALPHABET]
    words = [*ALPHABET, *endings, "of</w>", "pi", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\no f</w>\np i\n")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=48, bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def test_prompts_hold_the_class_names():
    names = ("background", "left atrium")
    assert class_prompts("A pixel of [CLS]", names) == PROMPTS
    assert class_prompts("A pixel of a [CLS].", names)[1] == "A pixel of a left atrium."


def test_clip_is_the_projected_feature_of_each_prompt_alone(clip_folder):
    from transformers import CLIPTextModelWithProjection

    text = clip_text(str(clip_folder), PROMPTS)
    assert text.embeddings.shape == (2, 12) and text.embeddings.dtype == torch.float32
    assert text.origin == {"source": "clip", "model": str(clip_folder), "prompts": PROMPTS}
    letter = {letter: number for number, letter in enumerate(ALPHABET)}
    end = {letter: number + 26 for letter, number in letter.items()}
    start_of_text, end_of_text = 54, 55
    words = [
        [end["a"]],
        [53, letter["x"], letter["e"], end["l"]],  # "pi" is one token
        [52],  # "of"
        [*(letter[c] for c in "lef"), end["t"]],
        [*(letter[c] for c in "atriu"), end["m"]],
    ]
    tokens = torch.tensor([[start_of_text, *(token for word in words for token in word), end_of_text]])
    tower = CLIPTextModelWithProjection.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        # No padding: the longer prompt pads the shorter one.
        expected = tower(input_ids=tokens).text_embeds[0]
    torch.testing.assert_close(text.embeddings[1], expected)
    torch.testing.assert_close(
        clip_text(str(clip_folder), PROMPTS[:1]).embeddings[0], text.embeddings[0], atol=1e-5, rtol=1e-4
    )


def test_clip_for_a_dataset_and_its_cache(clip_folder, tmp_path):
    config = load_config("la_vclipseg", [f"method.clip_model={clip_folder}"])
    text = VCLIPSeg.text(config, ("background", "left atrium"))
    assert text.origin["prompts"] == PROMPTS
    text.save(tmp_path / "text.safetensors")
    again = TextEmbeddings.load(tmp_path / "text.safetensors")
    assert again.origin == text.origin and torch.equal(again.embeddings, text.embeddings)
    released = load_config("la_vclipseg", [f"method.clip_model={clip_folder}", "preset=released"])
    assert VCLIPSeg.text(released, ("background", "left atrium")).origin["prompts"][0] == (
        "A pixel of a background."
    )


def test_a_cache_that_is_missing_or_damaged(tmp_path):
    path = tmp_path / "text.safetensors"
    with pytest.raises(FileNotFoundError, match="do not exist"):
        TextEmbeddings.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="are damaged"):
        TextEmbeddings.load(path)
    save_file({"weight": torch.zeros(2, 3)}, path)  # of something else
    with pytest.raises(ValueError, match="are damaged"):
        TextEmbeddings.load(path)


def test_random_rows_are_orthogonal_and_fixed():
    first, again, other = random_text(3, 512, 0), random_text(3, 512, 0), random_text(3, 512, 1)
    rows = first.embeddings
    torch.testing.assert_close(rows @ rows.T, 512 * torch.eye(3), atol=1e-3, rtol=1e-5)
    assert torch.equal(rows, again.embeddings) and not torch.allclose(rows, other.embeddings)
    assert first.origin == {"source": "random", "seed": 0}
    with pytest.raises(ValueError, match="text_width is 2, accepted are widths from the 3 classes on"):
        random_text(3, 2, 0)


@pytest.mark.parametrize("ending", ["npz", "safetensors", "pt", "pth"])
def test_files(ending, tmp_path):
    embeddings = torch.randn(2, 512)
    path = tmp_path / f"text.{ending}"
    if ending == "npz":
        np.savez(path, text=embeddings.numpy())
    elif ending == "safetensors":
        save_file({"text": embeddings}, path)
    else:
        torch.save(embeddings if ending == "pth" else {"text": embeddings}, path)
    text = file_text(path, 2)
    assert torch.equal(text.embeddings, embeddings)
    assert text.origin == {"source": "file", "file": path.name}
    with pytest.raises(
        ValueError, match=r"holds float32 \[2, 512\], accepted is floating point \[4, width\]"
    ):
        file_text(path, 4)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_refused(tmp_path, capsys):
    for missing in (tmp_path / "text.npz", "~nobody/text.npz"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            file_text(missing, 2)
    (tmp_path / "text.csv").write_text("1,2")
    with pytest.raises(ValueError, match="accepted are .npz, .safetensors, .pt and .pth"):
        file_text(tmp_path / "text.csv", 2)
    for ending in ("npz", "safetensors", "pt"):
        damaged = tmp_path / f"damaged.{ending}"
        damaged.write_bytes(b"neither this nor that")
        with pytest.raises(ValueError, match=str(damaged)) as error:
            file_text(damaged, 2)
        assert len(str(error.value).splitlines()) == 1
    np.savez(tmp_path / "two.npz", a=np.ones((2, 3)), b=np.ones((2, 3)))
    with pytest.raises(ValueError, match="holds 2 arrays"):
        file_text(tmp_path / "two.npz", 2)
    np.savez(tmp_path / "nan.npz", text=np.full((2, 3), np.nan))
    np.savez(tmp_path / "large.npz", text=np.full((2, 3), 1e300))
    for name in ("nan", "large"):
        with pytest.raises(ValueError, match=f"{name}.npz holds NaN or infinite values, or some too large for float32"):
            file_text(tmp_path / f"{name}.npz", 2)
    np.savez(tmp_path / "words.npz", text=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="words.npz: can't convert"):
        file_text(tmp_path / "words.npz", 2)
    torch.save(Payload(), tmp_path / "code.pt")
    with pytest.raises(ValueError, match="code.pt"):
        file_text(tmp_path / "code.pt", 2)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_that_was_cut_short_is_named(zipped, tmp_path):
    path = tmp_path / "text.pt"
    torch.save(torch.randn(2, 8), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(0, len(whole), 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"^method.text_file {path}: .") as error:
            file_text(path, 2)
        assert len(str(error.value).splitlines()) == 1


def test_text_stored_with_its_gradient_is_frozen(tmp_path):
    torch.save(torch.randn(2, 8, requires_grad=True) * 1, tmp_path / "text.pt")
    text = file_text(tmp_path / "text.pt", 2)
    config = load_config("phantom_vclipseg", ["network.filters=[2]"])
    fold_batch_norm(build_method(config, 2, choose_device("cpu"), text))  # which a graph would refuse to copy


def test_without_clip_one_line_names_three_ways_out_before_anything_is_made(tmp_path):
    """Where a mirror of the hub is named, nobody else is asked."""
    command = [
        sys.executable, "-m", "semiseg.train", "--config", "phantom_vclipseg", "method.text=clip",
        "method.clip_model=semiseg-tests/there-is-no-such-model",
    ]  # fmt: skip
    mirror = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=mirror, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: method.text=clip cannot load 'semiseg-tests/there-is-no-such-model'")
    for way_out in (
        "pip install transformers",
        "method.clip_model=",
        "method.text=file",
        "method.text=random",
    ):
        assert way_out in line
    assert "refused" in line or not importlib.util.find_spec("transformers")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_its_tokenizer(clip_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(ValueError, match="words for a tower of 56.*three ways out"):
        clip_text(str(tmp_path), PROMPTS)


def test_a_damaged_tokenizer(clip_folder, tmp_path):
    for path in clip_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "vocab.json").write_text('{"a": 0')
    with pytest.raises(ValueError, match="three ways out") as error:
        clip_text(str(tmp_path), PROMPTS)
    assert len(str(error.value).splitlines()) == 1


def test_a_model_that_no_address_can_name():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="cannot load 'my models/clip text' .*three ways out"):
        clip_text("my models/clip text", PROMPTS)


def test_a_folder_may_begin_with_a_tilde(clip_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(clip_folder.parent))
    text = clip_text(f"~/{clip_folder.name}", PROMPTS)
    assert torch.equal(text.embeddings, clip_text(str(clip_folder), PROMPTS).embeddings)
    assert text.origin["model"] == f"~/{clip_folder.name}"


def test_a_folder_without_a_model_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="three ways out") as error:
        clip_text(str(tmp_path), PROMPTS)
    assert len(str(error.value).splitlines()) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="transformers is not installed"):
        clip_text(str(tmp_path), PROMPTS)


def test_the_checkpoint_carries_the_prompts_text_and_frozen():
    config = load_config("phantom_vclipseg", ["network.filters=[2]"])
    text = random_text(3, 512, 5)
    method = build_method(config, 3, choose_device("cpu"), text)
    assert torch.equal(method.state_dict()["network.prompt.text"], text.embeddings)
    assert not {name for name, _ in method.named_parameters() if name.endswith(".text")}
