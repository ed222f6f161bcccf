"""PixArt Sigma: full size, text, the channels that are trained. training.md §4.3; acceptance 23, 24, 28."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from lycoris.wrapper import create_lycoris_from_weights
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.save_and_load import set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_world import Ran, TinyWorld
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from simpletuner.data.loader import Batch
from simpletuner.data.plan import START
from simpletuner.errors import ExitCode
from simpletuner.families.base import build_family
from simpletuner.families.pixart_sigma.family import PixArtSigma, T5Captions
from simpletuner.families.registry import load_spec
from simpletuner.job import CommandName
from simpletuner.train.adapters import attach_adapter

SHAPE: dict[str, Any] = {
    "num_layers": 42,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 128,
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "use_additional_conditions": False,
}


def test_the_900m_has_908_433_824_parameters() -> None:
    with torch.device("meta"):
        denoiser = PixArtTransformer2DModel(**SHAPE)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == 908_433_824
    adapted = [name for name, _ in denoiser.named_modules() if name.endswith((".to_k", ".to_q", ".to_v", ".to_out.0"))]
    assert len(adapted) == 336
    width = 16 * 72
    assert 336 * 16 * 2 * width == 12_386_304


@pytest.fixture(scope="module")
def family(shared: TinyWorld) -> PixArtSigma:
    config = shared.resolve().require()
    found = build_family(config, load_spec("pixart_sigma"))
    assert isinstance(found, PixArtSigma)
    return found


@pytest.fixture(scope="module")
def captions(family: PixArtSigma) -> T5Captions:
    return family.load_caption_encoder(torch.device("cpu"))


@pytest.fixture(scope="module")
def denoiser(family: PixArtSigma) -> Any:
    return family.load_denoiser().eval()


def batch_of(text: dict[str, Tensor], size: int) -> Batch:
    names = tuple(f"set/{index}" for index in range(size))
    return Batch(
        latents_BCHW=torch.zeros(size, 4, 8, 8),
        text=text,
        samples=names,
        visits=(0,) * size,
        captions=names,
        dataset_id="set",
        target=(64, 64),
        position=START,
        next_position=START,
    )


def noisy(size: int) -> Tensor:
    return torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a red cat", "blue", "", "a very long caption of many words about a teal and golden field"]


@torch.no_grad()
def test_trimmed_text_is_the_officials_text(family: PixArtSigma, captions: T5Captions, denoiser: Any) -> None:
    """Acceptance 24: unmasked tokens only, padded to the longest, against 300 tokens and a mask."""
    ours = family.collate_text(captions.encode(PROMPTS))
    full = [captions.encode_prompt(prompt) for prompt in PROMPTS]
    theirs = {
        "prompt_embeds": torch.stack([row["prompt_embeds"] for row in full]),
        "prompt_mask": torch.stack([row["prompt_attention_mask"] for row in full]),
    }
    assert ours["prompt_embeds"].shape[1] < 100 and theirs["prompt_embeds"].shape[1] == 300
    t = torch.tensor([5, 250, 700, 999])
    x = noisy(4)
    trimmed = family.predict(denoiser, x, t, batch_of(ours, 4))
    untrimmed = family.predict(denoiser, x, t, batch_of(theirs, 4))
    assert torch.allclose(trimmed, untrimmed, rtol=1e-5, atol=1e-5)
    for index in range(4):
        alone = family.collate_text(captions.encode([PROMPTS[index]]))
        assert "prompt_mask" not in alone
        single = family.predict(denoiser, x[index : index + 1], t[index : index + 1], batch_of(alone, 1))
        assert torch.allclose(single[0], trimmed[index], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prompt_is_encoded_as_the_pipeline_does(family: PixArtSigma, captions: T5Captions, shared: TinyWorld) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(shared.model, torch_dtype=torch.float32)
    embeds, mask, _, _ = pipeline.encode_prompt("A <b>RED</b> cat!", do_classifier_free_guidance=False)
    ours = captions.encode_prompt("A <b>RED</b> cat!")
    wanted, _, _, _ = pipeline.encode_prompt("A <b>RED</b> cat!", do_classifier_free_guidance=False, clean_caption=True)
    assert torch.equal(ours["prompt_embeds"], wanted[0])
    length = int(ours["prompt_attention_mask"].sum())
    cached = captions.encode(["A <b>RED</b> cat!"])[0]["prompt_embeds"]
    assert torch.allclose(cached, wanted[0, :length], atol=1e-6)
    assert mask.shape == (1, 300) and embeds.shape[1] == 300


def test_the_learned_variance_is_not_trained(family: PixArtSigma, captions: T5Captions) -> None:
    """Acceptance 23: channels 4–7 of the output change neither the loss nor any gradient."""
    text = family.collate_text(captions.encode(PROMPTS[:2]))
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for extra in (0.0, 100.0):
        denoiser = family.load_denoiser()
        rows = denoiser.proj_out.weight.view(2, 2, 8, -1)
        with torch.no_grad():
            rows[:, :, 4:] += extra
        predicted = family.predict(denoiser, noisy(2), torch.tensor([3, 800]), batch_of(text, 2))
        assert predicted.shape == (2, 4, 8, 8)
        predicted.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
        assert not grads["proj_out.weight"].view(2, 2, 8, -1)[:, :, 4:].any()
        results.append((predicted.detach(), grads))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def test_a_checkpoint_with_size_conditions_gets_pixels(family: PixArtSigma) -> None:
    denoiser = PixArtTransformer2DModel(**SHAPE | {
        "num_layers": 1, "num_attention_heads": 6, "attention_head_dim": 8, "cross_attention_dim": 48,
        "caption_channels": 32, "use_additional_conditions": True, "sample_size": 8,
    })  # fmt: skip
    seen: dict[str, Tensor] = {}
    denoiser.adaln_single.register_forward_pre_hook(
        lambda _, words, keys: seen.update(keys.get("added_cond_kwargs") or words[1]), with_kwargs=True
    )
    text = {"prompt_embeds": torch.randn(2, 5, 32)}
    family.predict(denoiser, torch.randn(2, 4, 8, 12), torch.tensor([1, 2]), batch_of(text, 2))
    assert seen["resolution"].tolist() == [[64.0, 96.0]] * 2
    assert seen["aspect_ratio"].flatten().tolist() == pytest.approx([64 / 96] * 2)


def test_a_sentencepiece_tokenizer_of_the_repositories(tmp_path: Path) -> None:
    """The 900M repositories carry `spiece.model`; it must give the pieces it was trained for, and an ending."""
    import sentencepiece

    text = tmp_path / "text.txt"
    colours, things = ("red", "green", "blue"), ("mat", "bed", "sea")
    text.write_text("\n".join(f"a {colour} cat on a {thing}" for colour in colours for thing in things) * 20)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=60, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",'
        ' "extra_ids": 0, "model_max_length": 512}'
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer = T5Tokenizer.from_pretrained(folder)
    for caption in ("a red cat on a mat", "a blue cat", "cat sea"):
        assert tokenizer(caption).input_ids == [*reference.encode(caption), 1]
    config = T5Config(vocab_size=80, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    entries = T5Captions(tokenizer, encoder, "f").encode(["a red cat on a mat", ""])
    assert [len(entry["prompt_embeds"]) for entry in entries] == [
        len(reference.encode("a red cat on a mat")) + 1, 1,
    ]  # fmt: skip


def test_latents_are_posterior_samples_of_their_key(family: PixArtSigma) -> None:
    encoder = family.load_picture_encoder(torch.device("cpu"))
    pixels = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = ["0" * 63 + "1", "f" * 64]
    both = encoder.encode(pixels, keys, sample=True)
    assert both[0].shape == (4, 8, 8)
    assert torch.allclose(encoder.encode(pixels[1:], keys[1:], sample=True)[0], both[1], atol=1e-6)
    assert not torch.allclose(encoder.encode(pixels[:1], keys[1:], sample=True)[0], both[0])
    modes = [encoder.encode(pixels, names, sample=False) for names in (keys, keys[::-1])]
    assert all(torch.equal(*pair) for pair in zip(*modes, strict=True)) and not torch.allclose(modes[0][0], both[0])


def test_the_fingerprints_follow_files_and_settings(shared: TinyWorld, tmp_path: Path, family: PixArtSigma) -> None:
    import shutil

    spec = load_spec("pixart_sigma")

    def prints(**options: Any) -> tuple[str, str]:
        found = build_family(shared.resolve(**options).require(), spec)
        return found.picture_fingerprint(), found.caption_fingerprint()

    base = prints()
    moved = Path(shutil.copytree(shared.model, tmp_path / "moved"))
    assert prints(pretrained_model_name_or_path=str(moved)) == base
    assert prints(vae_dtype="bf16")[0] != base[0] and prints(vae_dtype="bf16")[1] == base[1]
    assert prints(base_model_default_dtype="bf16")[1] != base[1]
    file = moved / "vae/config.json"
    file.write_text(file.read_text().replace("0.13025", "0.18"))
    changed = prints(pretrained_model_name_or_path=str(moved))
    assert changed[0] != base[0] and changed[1] == base[1]
    other = prints(pretrained_vae_model_name_or_path=str(moved))
    assert other == (changed[0], base[1])


@pytest.mark.parametrize("prediction", ["v_prediction"])
def test_an_exported_scheduler_predicts_as_was_trained(shared: TinyWorld, prediction: str) -> None:
    ran = shared.run(output_dir="v", prediction_type=prediction, max_train_steps=1)
    config = json.loads((ran.output / "pipeline/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == prediction


NANO = load_spec("pixart_sigma").flavours["nano"].repository


@pytest.mark.parametrize("lora_type", ["standard", "lycoris"])
def test_an_adapter_is_trained_resumed_and_exported(shared: TinyWorld, lora_type: str) -> None:
    """The export passes its gate, and gives others what was trained: peft on the denoiser, lycoris' own reader."""
    options = {
        "model_type": "lora", "lora_type": lora_type, "pretrained_model_name_or_path": NANO, "lora_rank": 4,
        "learning_rate": 1e-2, "max_train_steps": 4, "output_dir": f"nano-{lora_type}", "cache_dir": "nano",
        "cache_dir_text": "nano/text", "lora_dropout": 0.0,
    }  # fmt: skip
    stopped = shared.run_until(2, CommandName.STOP, **options)
    assert stopped.code is ExitCode.STOPPED
    ran = shared.run(**options)
    assert ran.code is ExitCode.DONE and ran.of_type("training.status")[0]["data"]["resumed_from"] == "checkpoint-2"
    denoiser = PixArtTransformer2DModel.from_pretrained(f"{NANO}/transformer", torch_dtype=torch.float32)
    file = ran.output / "pytorch_lora_weights.safetensors"
    with torch.no_grad():
        bare = answer(denoiser)
        if lora_type == "standard":
            with safe_open(file, "pt") as opened:
                described = json.loads(opened.metadata()["lora_adapter_metadata"])
            settings = {key.removeprefix("transformer."): value for key, value in described.items()}
            inject_adapter_in_model(LoraConfig(**settings), denoiser)
            tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
            assert not set_peft_model_state_dict(denoiser, tensors).unexpected_keys
        else:
            create_lycoris_from_weights(1.0, str(file), denoiser)[0].apply_to()
        adapted = answer(denoiser)
    assert not torch.allclose(bare, adapted, atol=1e-3)
    assert torch.allclose(adapted, answer(trained_denoiser(shared, ran, **options)), atol=1e-5)
    assert (ran.output / "export/adapter_comfyui.safetensors").is_file()


def trained_denoiser(shared: TinyWorld, ran: Ran, **options: Any) -> Any:
    """The network as the trainer had it at its end, from the checkpoint's own state."""
    denoiser = PixArtTransformer2DModel.from_pretrained(f"{NANO}/transformer", torch_dtype=torch.float32)
    adapter = attach_adapter(denoiser, shared.resolve(**options).require(), load_spec("pixart_sigma"))
    adapter.load(load_file(ran.output / "checkpoint-4/pytorch_lora_weights.safetensors"))
    return denoiser


@torch.no_grad()
def answer(denoiser: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 5, denoiser.config.caption_channels, generator=generator)
    noisy = torch.randn(1, denoiser.config.in_channels, 8, 8, generator=generator)
    return denoiser.eval()(noisy, text, torch.tensor([500]), {"resolution": None, "aspect_ratio": None}).sample


def test_a_picture_that_is_masked_all_over_is_no_dead_adapter(world: TinyWorld) -> None:
    world.entries[0]["conditioning_data"] = ["mask"]
    (world.root / "mask").mkdir()
    for path in world.pictures.iterdir():
        Image.new("RGB", Image.open(path).size).save(world.root / "mask" / path.name)
    world.entries.append({"id": "mask", "conditioning_type": "mask", "instance_data_dir": "mask", "resolution": 64})
    ran = world.run(model_type="lora", lora_rank=4, max_train_steps=2)
    assert ran.code is ExitCode.DONE and ran.losses() == [0.0, 0.0]
