"""Adapters in other frameworks: Lightning, sentence-transformers, diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from random_adapters import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.adapters import attach, load
from lorakit.errors import AdapterStateError, TargetError
from lorakit.methods.lora.method import LoRA

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the frameworks

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


@torch.no_grad()
def noise(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 8)))
    return model(x, torch.tensor([3, 7]), encoder_hidden_states=text).sample


def test_diffusers_saves_the_adapted_model(tmp_path: Path) -> None:
    model = unet()
    base = noise(model)
    randomise(attach(model, LoRA(rank=2, alpha=4, targets=TARGETS)))
    model.save_pretrained(tmp_path)
    saved = noise(type(model).from_pretrained(tmp_path))
    torch.testing.assert_close(saved, noise(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(saved, base, atol=1e-2)


def test_diffusers_fuses_no_adapted_layers() -> None:
    model = unet()
    attach(model, LoRA(rank=2, targets=TARGETS))
    with pytest.raises(AdapterStateError, match="fuse_qkv_projections"):
        model.fuse_qkv_projections()
    fused = unet()
    fused.fuse_qkv_projections()
    with pytest.raises(TargetError, match="never calls"):
        attach(fused, LoRA(rank=2, targets="to_q"))


def test_adapters_go_to_diffusers_and_back(tmp_path: Path) -> None:
    model = unet()
    adapters = attach(model, LoRA(rank=2, alpha=6, targets=TARGETS))
    randomise(adapters)
    folder = adapters.save(tmp_path / "mine")
    from diffusers import StableDiffusionPipeline

    file = load_file(folder / "adapter_model.safetensors")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "diffusers",
        unet_lora_layers={key.removeprefix("base_model.model."): t for key, t in file.items()},
        unet_lora_adapter_metadata=json.loads((folder / "adapter_config.json").read_text()),
    )
    other = unet()
    state, metadata = StableDiffusionPipeline.lora_state_dict(
        tmp_path / "diffusers", return_lora_metadata=True
    )[::2]
    other.load_lora_adapter(state, prefix="unet", metadata=metadata, adapter_name="style")
    torch.testing.assert_close(noise(other), noise(model))
    other.peft_config["style"].save_pretrained(tmp_path / "back")
    tensors = peft.get_peft_model_state_dict(other, adapter_name="style")
    save_file(tensors, tmp_path / "back" / "adapter_model.safetensors")
    again = unet()
    load(again, tmp_path / "back")
    torch.testing.assert_close(noise(again), noise(model))


def test_lightning_resumes_the_adapter(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    import tiny_models

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_models.build("llama")
            self.adapters = [attach(self.model, LoRA(rank=2), seed=0)]  # a list is no submodule

        def training_step(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.adapters[0].trainable_parameters(), 1e-2)

    rows = torch.randint(3, 99, (4, 6), generator=torch.Generator().manual_seed(0))
    batches = torch.utils.data.DataLoader(rows, batch_size=2)

    def fit(epochs: int, resume: Path | None = None) -> Any:
        model = Lit()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, batches, ckpt_path=resume, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole = fit(2).state_dict()
    fit(1)
    resumed = fit(2, tmp_path / "1.ckpt").state_dict()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    initial = Lit().state_dict()
    assert any(not torch.equal(initial[key], whole[key]) for key in whole)


def test_sentence_transformers_resumes_the_adapter(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    from lorakit.models.sources import resolve

    class Trainer(library.SentenceTransformerTrainer):
        def _load_from_checkpoint(self, path: str) -> None:
            state = type(self.model)(path, device="cpu").state_dict()
            saved = load_file(Path(path, "model.safetensors"))
            state.update({f"0.model.{key}": tensor for key, tensor in saved.items()})
            self.model.load_state_dict(state, strict=False)

    rows = Dataset.from_dict({"anchor": ["a pub", "a plane"] * 4, "positive": ["food", "sky"] * 4})

    def model() -> Any:
        return library.SentenceTransformer(resolve("minilm-l6").path_or_id, device="cpu")

    def train(resume: str | None = None) -> Any:
        adapted = model()
        attach(adapted[0].auto_model, LoRA(rank=2, targets="attention.qv"), seed=0)
        args = library.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            use_cpu=True,
        )
        loss = MultipleNegativesRankingLoss(adapted)
        Trainer(model=adapted, args=args, train_dataset=rows, loss=loss).train(resume)
        return adapted.eval()

    def encode(encoder: Any) -> Tensor:
        return encoder.encode(["the river", "a park"], convert_to_tensor=True)

    whole = train()
    resumed = train(str(tmp_path / "out" / "checkpoint-1"))
    assert torch.equal(encode(resumed), encode(whole))
    whole.save(str(tmp_path / "saved"))
    saved = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(encode(saved), encode(whole), atol=1e-5, rtol=0)
    assert not torch.allclose(encode(model()), encode(whole), atol=1e-3)
