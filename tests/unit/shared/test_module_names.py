"""One name for a layer of a language model, whichever parents it has."""

from __future__ import annotations

import pytest

from shared.module_names import encoders, is_of_encoder, relative_name


@pytest.mark.parametrize(
    "parents", ["", "model.", "language_model.model.", "model.language_model.", "language_model.", "model.text_model."]
)
@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj", "lm_head"])
def test_parents_are_left_out(parents, name):
    assert relative_name(parents + name) == name


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn", "visual.blocks.0.attn.qkv"])
def test_other_names_stay(name):
    assert relative_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.layers.0.linear_attn.in_proj_qkv",
        "language_model.lm_head",
        "model.layers.0.mlp.shared_expert.up_proj",
    ],
)
def test_layers_of_language_models_are_of_no_encoder(name):
    assert not is_of_encoder(name)


def test_encoders_are_those_that_a_configuration_describes():
    assert encoders({"vision_config": {"depth": 2}, "audio_config": None}) == ["vision_config"]
    assert encoders({"text_config": {}}) == []
