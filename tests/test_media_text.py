"""Laws of the text encoder: upstream's weights mean the same in the library's class; prompts are encoded once."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cli import app
from export.companions import accompany, prompt_reader
from export.manifest import Source
from export.write import write_bundle
from ispa_deploy.errors import InputError
from ispa_deploy.media.text import PromptCache, PromptReader, TextEncoder, clean_prompt, open_tokeniser, umt5
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import ModelSpec

transformers = pytest.importorskip("transformers")

SPEC = ModelSpec(
    name="tiny", dim=32, ffn_dim=48, heads=2, layers=1, freq_dim=16, text_dim=24, text_len=12, latent_channels=4,
    latent_height=4, latent_width=4, patch=(1, 1, 1), window_frames=12, sink_frames=1, steps=(1000,),
)  # fmt: skip
WORDS = ["a", "red", "ring", "cat", "on", "the", "moon", "&", "<b>"]
DIM, HEADS, WIDTH, FFN, LAYERS, BUCKETS = SPEC.text_dim, 3, 8, 20, 2, 32
CPU = torch.device("cpu")


def upstream_weights(generator: torch.Generator, vocabulary: int = 20) -> dict[str, Tensor]:
    """A state dict under upstream's names; DIM is not HEADS x WIDTH x 1 by chance only."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    state = {"token_embedding.weight": draw(vocabulary, DIM), "norm.weight": 1 + draw(DIM, scale=0.2)}
    inner = HEADS * WIDTH
    for i in range(LAYERS):
        at = f"blocks.{i}."
        state |= {f"{at}norm{n}.weight": 1 + draw(DIM, scale=0.2) for n in (1, 2)}
        state |= {f"{at}attn.{n}.weight": draw(inner, DIM, scale=DIM**-0.5) for n in "qkv"}
        state[f"{at}attn.o.weight"] = draw(DIM, inner, scale=inner**-0.5)
        state[f"{at}pos_embedding.embedding.weight"] = draw(BUCKETS, HEADS)
        state |= {f"{at}ffn.{n}.weight": draw(FFN, DIM, scale=DIM**-0.5) for n in ("gate.0", "fc1")}
        state[f"{at}ffn.fc2.weight"] = draw(DIM, FFN, scale=FFN**-0.5)
    return state


def reference(state: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """UMT5's encoder from its description, under upstream's names: (L,) ids and mask -> (L, DIM)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def bucket(distance: int) -> int:
        """Half of the buckets for each direction; the near half of those is exact, the rest logarithmic up to 128."""
        half, near = BUCKETS // 2, BUCKETS // 4
        size = abs(distance)
        if size >= near:
            size = min(near + int(math.log(size / near) / math.log(128 / near) * (half - near)), half - 1)
        return size + (half if distance > 0 else 0)

    length = len(ids)
    buckets = torch.tensor([[bucket(j - i) for j in range(length)] for i in range(length)])
    x = state["token_embedding.weight"][ids]
    for i in range(LAYERS):
        at = f"blocks.{i}."
        y = norm(x, f"{at}norm1")
        q, k, v = ((y @ state[f"{at}attn.{n}.weight"].T).view(length, HEADS, WIDTH) for n in "qkv")
        bias = state[f"{at}pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        scores = torch.einsum("inc,jnc->nij", q, k) + bias
        weights = scores.masked_fill(mask[None, None] == 0, -1e30).softmax(-1)
        mixed = torch.einsum("nij,jnc->inc", weights, v).reshape(length, -1)
        x = x + mixed @ state[f"{at}attn.o.weight"].T
        y = norm(x, f"{at}norm2")
        gate = F.gelu(y @ state[f"{at}ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ state[f"{at}ffn.fc1.weight"].T)) @ state[f"{at}ffn.fc2.weight"].T
    return norm(x, "norm")


@pytest.mark.parametrize("real", [12, 5])
def test_sixteen_bit_weights_run_as_they_are(rng: torch.Generator, real: int) -> None:
    """As upstream publishes them; compared with the same rounded numbers in 32 bit."""
    state = {name: tensor.bfloat16() for name, tensor in upstream_weights(rng).items()}
    ids = torch.randint(0, 20, (12,), generator=rng)
    mask = (torch.arange(12) < real).long()
    model = umt5(state, "here")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rows = model(input_ids=ids[None], attention_mask=mask[None]).last_hidden_state[0, :real].float()
    expected = reference({name: tensor.float() for name, tensor in state.items()}, ids, mask)[:real]
    assert float((rows - expected).norm() / expected.norm()) < 0.03


def test_the_published_geometry_is_read_off_the_shapes() -> None:
    """Tensors of stride 0: 5.7 billion parameters that take no memory."""

    def shape(*sizes: int) -> Tensor:
        return torch.zeros((), dtype=torch.bfloat16).expand(sizes)

    state = {"token_embedding.weight": shape(256384, 4096), "norm.weight": shape(4096)}
    for i in range(24):
        at = f"blocks.{i}."
        state |= {f"{at}norm{n}.weight": shape(4096) for n in (1, 2)}
        state |= {f"{at}attn.{n}.weight": shape(4096, 4096) for n in "qkvo"}
        state[f"{at}pos_embedding.embedding.weight"] = shape(32, 64)
        state |= {f"{at}ffn.{n}.weight": shape(10240, 4096) for n in ("gate.0", "fc1")}
        state[f"{at}ffn.fc2.weight"] = shape(4096, 10240)
    config: Any = umt5(state, "here").config
    assert (config.d_kv, config.num_heads, config.d_ff, config.num_layers) == (64, 64, 10240, 24)
    assert (config.dense_act_fn, config.relative_attention_max_distance) == ("gelu_new", 128)
    assert config.layer_norm_epsilon == 1e-6
    assert sum(tensor.numel() for tensor in state.values()) == 5_680_910_336


def make_tokeniser(folder: Path, *, ends: bool) -> Path:
    """A tokeniser of whole words in a folder; `ends`: whether it adds the end token itself."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    if ends:
        inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model as upstream publishes it."""
    folder = tmp_path_factory.mktemp("base")
    torch.save(upstream_weights(torch.Generator().manual_seed(3)), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    make_tokeniser(folder / "google" / "umt5-xxl", ends=True)
    return folder


def reader(files: Path, cache: Path | None = None, tokenizer: Path | None = None) -> PromptReader:
    return prompt_reader(files, tokenizer, SPEC, CPU, PromptCache(cache) if cache else None)


@pytest.mark.parametrize("real", [12, 5])
def test_upstream_weights_compute_what_upstream_describes(rng: torch.Generator, real: int) -> None:
    """140 tokens reach the last, logarithmic, buckets too."""
    state = upstream_weights(rng)
    length = 140 if real == 12 else 9
    ids = torch.randint(0, 20, (length,), generator=rng)
    mask = torch.ones(length, dtype=torch.long)
    mask[real if length == 9 else length :] = 0
    rows = umt5(state, "here")(input_ids=ids[None], attention_mask=mask[None]).last_hidden_state[0]
    torch.testing.assert_close(rows[mask > 0], reference(state, ids, mask)[mask > 0], atol=1e-5, rtol=1e-5)


def test_the_librarys_own_weights_are_the_same_model_from_a_folder_or_under_upstreams_names(
    rng: torch.Generator, files: Path, tmp_path: Path
) -> None:
    state = upstream_weights(rng)
    config = umt5(state, "here").config
    library = transformers.UMT5EncoderModel(config).eval().requires_grad_(False)
    library.load_state_dict(umt5(state, "here").state_dict())
    library.save_pretrained(str(tmp_path / "hf" / "text_encoder"), max_shard_size="8KB")
    assert len(list((tmp_path / "hf" / "text_encoder").glob("*.safetensors"))) > 1
    torch.save(state, tmp_path / "upstream.pth")
    tokenizer = make_tokeniser(tmp_path / "hf" / "tokenizer", ends=True)
    first = reader(tmp_path / "hf").rows(["a red cat"])[0]
    second = reader(tmp_path / "upstream.pth", tokenizer=tokenizer).rows(["a red cat"])[0]
    tokens = open_tokeniser(tokenizer)("a red cat", padding="max_length", max_length=12, return_tensors="pt")
    rows = library(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    for mine in (first, second):  # not to the bit: kernels choose their path by the address of mapped weights
        torch.testing.assert_close(mine[:, :4], rows[:, :4], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(("prompt", "tokens"), [("a red ring", 4), (" ".join(WORDS * 4), 12), ("", 1)])
def test_rows_end_with_the_end_token_and_are_zero_after_it(
    files: Path, tmp_path: Path, prompt: str, tokens: int, ends: bool
) -> None:
    rows = reader(files, tokenizer=make_tokeniser(tmp_path, ends=ends)).rows([prompt])[0]
    assert (rows.shape, rows.dtype) == ((1, SPEC.text_len, SPEC.text_dim), torch.float32)
    assert bool((rows[0, :tokens].abs().sum(-1) > 0).all())
    assert not rows[0, tokens:].any()
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    ids = [*(words[word] for word in prompt.split()), *[words["</s>"]]][:tokens]
    ids[-1] = words["</s>"]
    padded = torch.tensor(ids + [0] * (SPEC.text_len - len(ids)))
    mask = (torch.arange(SPEC.text_len) < tokens).long()
    state = torch.load(files / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    torch.testing.assert_close(rows[0, :tokens], reference(state, padded, mask)[:tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("written", "clean"),
    [
        ("  a\n red\t\tring ", "a red ring"),
        ("a &amp;amp; b", "a & b"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("&lt;b&nbsp;c", "<b c"),
        ("déjà vu", "déjà vu"),
    ],
)
def test_prompts_are_cleaned_as_upstream_does(written: str, clean: str) -> None:
    assert clean_prompt(written) == clean


def test_broken_encoding_is_mended_where_ftfy_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ftfy")
    assert clean_prompt("dÃ©jÃ  vu") == "déjà vu"
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt("dÃ©jÃ") == "dÃ©jÃ"


def test_each_prompt_is_encoded_once_and_the_encoder_is_let_go(files: Path, tmp_path: Path) -> None:
    opened = []
    inner = reader(files, tmp_path / "cache")

    def count() -> TextEncoder:
        opened.append(1)
        return inner.open_encoder()

    counting = PromptReader(count, inner.identity, inner.length, inner.width, inner.cache)
    first = counting.rows(["a red ring", "a  red ring\n", "the moon"])
    assert len(opened) == 1
    assert torch.equal(first[0], first[1])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    again = counting.rows(["the moon", "a red ring"])
    assert len(opened) == 1
    assert torch.equal(again[0], first[2])
    assert torch.equal(again[1], first[0])
    counting.rows(["a cat"])
    assert len(opened) == 2


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def of_another_shape(path: Path) -> None:
    save_file({"prompt_embeds": torch.zeros(3, SPEC.text_dim + 1)}, path)


def not_finite(path: Path) -> None:
    save_file({"prompt_embeds": torch.full((3, SPEC.text_dim), torch.nan)}, path)


@pytest.mark.parametrize("harm", [damaged, of_another_shape, not_finite])
def test_a_bad_cache_file_is_written_again(files: Path, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    good = reader(files, tmp_path).rows(["a red ring"])[0]
    (path,) = tmp_path.iterdir()
    before = load_file(path)["prompt_embeds"].clone()
    harm(path)
    assert torch.equal(reader(files, tmp_path).rows(["a red ring"])[0], good)
    assert torch.equal(load_file(path)["prompt_embeds"], before)


def test_the_cache_tells_encoders_and_tokenizers_apart(files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    state = torch.load(files / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    state["blocks.1.ffn.fc2.weight"] = state["blocks.1.ffn.fc2.weight"] * 1.01
    torch.save(state, other)
    tokenizer = files / "google" / "umt5-xxl"
    identities = {
        reader(files).identity,
        reader(other, tokenizer=tokenizer).identity,
        reader(files, tokenizer=make_tokeniser(tmp_path / "t", ends=False)).identity,
    }
    assert len(identities) == 3
    moved = tmp_path / "moved.pth"
    moved.write_bytes((files / "models_t5_umt5-xxl-enc-bf16.pth").read_bytes())
    assert reader(moved, tokenizer=tokenizer).identity == reader(files).identity


def tiny_bundle(folder: Path) -> Any:
    from export.bundle import open_bundle
    from export.sources import initialise_
    from ispa_deploy.model import CausalWanDiT
    from quant.convert import quantise_
    from quant.schemes import SCHEMES

    model = initialise_(CausalWanDiT(SPEC).requires_grad_(False).eval())
    scheme = SCHEMES["none"]
    report = quantise_(model, scheme)
    # As a published checkpoint: it has no rows of its own to fall back on.
    write_bundle(folder, model, scheme=scheme, report=report, source=Source("checkpoint", "tiny.pt", "0" * 64))
    return open_bundle(folder)


def test_a_stream_reads_its_prompts_and_their_cache_files_serve_as_embeddings(files: Path, tmp_path: Path) -> None:
    """Rows kept for the first prompt, given by hand, make the same latents as the encoder does."""
    from dataclasses import replace

    bundle = tiny_bundle(tmp_path / "bundle")
    options = StreamOptions(frames=6, policy="full")
    with pytest.raises(InputError, match="--text-encoder"):
        bundle.stream("a red ring", options)
    reading = accompany(bundle, text_encoder=files, prompt_cache=tmp_path / "cache")
    latents = [chunk.latents for chunk in reading.stream("a red ring", options)]
    other = [chunk.latents for chunk in reading.stream("the moon", options)]
    (tmp_path / "cache").rename(tmp_path / "before")
    next(iter(accompany(bundle, text_encoder=files, prompt_cache=tmp_path / "cache").stream("a red ring", options)))
    (kept,) = (tmp_path / "cache").iterdir()
    by_hand = replace(bundle, prompt_embeds=kept)
    for mine, theirs in zip(latents, by_hand.stream("ignored", options), strict=True):
        assert torch.equal(mine, theirs.latents)
    assert not torch.equal(latents[0], other[0])
    with pytest.raises(InputError, match="leave one out"):
        accompany(by_hand, text_encoder=files)


def test_run_encodes_every_prompt_of_the_command(files: Path, tmp_path: Path) -> None:
    """The latents it writes are those of a stream with the same rows, the later prompt's included."""
    bundle = tiny_bundle(tmp_path / "bundle")
    done = CliRunner().invoke(app, [
        "run", str(bundle.folder), "--prompt", "a red ring", "--at", "3:the moon", "--frames", "6", "--policy", "full",
        "--text-encoder", str(files), "--prompt-cache", str(tmp_path / "cache"), "--latents",
        str(tmp_path / "l.safetensors"), "--threads", "1", "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "cache").iterdir())) == 2
    reading = accompany(bundle, text_encoder=files, prompt_cache=tmp_path / "other")
    options = StreamOptions(frames=6, policy="full")
    one, two = ([c.latents for c in reading.stream("a red ring", options, switches=switches)]
                for switches in ([(3, "the moon")], []))  # fmt: skip
    written = load_file(tmp_path / "l.safetensors")["latents"]
    assert torch.equal(written, torch.cat(one, 1))
    assert not torch.equal(one[1], two[1])


def rejected(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_cannot_be_used_is_refused_in_one_line(files: Path, tmp_path: Path) -> None:
    tokenizer = files / "google" / "umt5-xxl"
    good = torch.load(files / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)

    def encoder(name: str, state: dict[str, Tensor]) -> Path:
        torch.save(state, tmp_path / name)
        return tmp_path / name

    lacking = encoder("lacking.pth", {n: t for n, t in good.items() if n != "blocks.1.attn.k.weight"})
    rejected("1 missing .*block.1.layer.0.SelfAttention.k", lambda: reader(lacking, tokenizer=tokenizer).rows(["a"]))
    name = "blocks.1.attn.k.weight"
    damaged = encoder("damaged.pth", {**good, name: torch.full_like(good[name], torch.nan)})
    rejected("1.layer.0.SelfAttention.k.weight holds NaN", lambda: reader(damaged, tokenizer=tokenizer).rows(["a"]))
    extra = encoder("extra.pth", {**good, "lm_head.weight": torch.zeros(1)})
    rejected("1 unexpected .*lm_head", lambda: reader(extra, tokenizer=tokenizer).rows(["a"]))
    other = encoder("other.pth", {"x": torch.zeros(2, 2)})
    rejected("no tensor 'shared.weight'", lambda: reader(other, tokenizer=tokenizer))
    small = encoder("small.pth", upstream_weights(torch.Generator(), vocabulary=5))
    rejected("token 11, the text encoder knows 5", lambda: reader(small, tokenizer=tokenizer).rows(["<b>"]))
    rejected("does not exist|expected a file", lambda: reader(tmp_path / "none.pth"))
    rejected("--tokenizer", lambda: reader(lacking))
    rejected("expected a folder with", lambda: reader(files, tokenizer=tmp_path))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    rejected("cannot be read", lambda: reader(files, tokenizer=tmp_path / "bad"))
    wide = encoder("wide.pth", {"token_embedding.weight": torch.zeros(3, 7)})
    rejected("rows of 7: model 'tiny' expects 24", lambda: reader(wide, tokenizer=tokenizer))
    bundle = tiny_bundle(tmp_path / "bundle")
    rejected("cannot be made .*--prompt-cache", lambda: accompany(bundle, text_encoder=files, prompt_cache=wide))


def test_without_transformers_the_command_that_installs_it_is_named(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    rejected(r"pip install 'ispa-deploy\[hf\]'", lambda: reader(files))


def test_opening_a_bundle_imports_no_transformers() -> None:
    code = "import export.bundle, ispa_deploy.media.vae, sys; print({'transformers', 'diffusers'} & sys.modules.keys())"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
