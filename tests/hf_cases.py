"""Small MLlama configs of transformers."""

from __future__ import annotations

import copy
from typing import Any

ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def mllama_config(text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """MllamaConfig of arguments for its text and vision config; the image token follows the vocabulary.

    Copies them: transformers completes rope_scaling in place.
    """
    from transformers import MllamaConfig

    text, vision = copy.deepcopy(text), copy.deepcopy(vision)
    return MllamaConfig(text_config=text, vision_config=vision, image_token_index=text["vocab_size"])
