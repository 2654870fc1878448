"""kohya's one file: the product that its readers form, up @ down alpha / r, from the written tensors alone."""

from __future__ import annotations

import pytest
import torch

from rasa_theory import LayerStack, solve_lora
from rasa_theory.formats import KohyaFile, ModuleNames, kohya_factors, kohya_metadata, kohya_prefix, kohya_tensors
from tests.helpers.problems import noise

NAMES = tuple(f"mid_block.attentions.{i}.to_q" for i in range(3))


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_ranks_that_differ_are_right_with_and_without_zeros(rank: int | None, kernel: tuple[int, ...]) -> None:
    factors, ranks = solve_lora(LayerStack(noise(3, 7, 6)), 3).factors, [1, 0, 3]
    modules = ModuleNames(NAMES, kernel=kernel)
    tensors = kohya_tensors(modules, factors, ranks, "lora_unet_")
    final = {key: KohyaFile(rank).tensor(key, tensor) for key, tensor in tensors.items()}
    assert len(final) == 2 * 3
    for i in (0, 2):
        name = f"lora_unet_mid_block_attentions_{i}_to_q"
        down, up, alpha = (final[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert down.shape == (rank or ranks[i], *((1, *kernel) if kernel else (6,)))
        assert up.shape == (7, rank or ranks[i], *(1 for _ in kernel))
        update = up.flatten(1) @ down.flatten(1) * float(alpha) / len(down)
        expected = factors.B[i, :, : ranks[i]] @ factors.A[i, : ranks[i]]
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)
        again = kohya_factors(modules, final, (7, 6), "lora_unet_")
        torch.testing.assert_close(again.update(i), expected, rtol=0, atol=1e-12)
    assert float(again.update(1).abs().max()) == 0


def test_the_metadata_and_the_beginning_of_the_keys() -> None:
    fields = kohya_metadata([4, 4], "base")
    assert (fields["ss_network_dim"], fields["ss_network_alpha"], fields["ss_sd_model_name"]) == ("4", "4", "base")
    assert kohya_metadata([4, 3], None)["ss_network_dim"] == "Dynamic"
    assert kohya_prefix("UNet2DConditionModel") == kohya_prefix(None) == "lora_unet_"
    assert kohya_prefix("CLIPTextModel") == "lora_te_"
