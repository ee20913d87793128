"""The processor files of a LLaVA-OneVision checkpoint, written so that plain transformers and vLLM load them.

They are written as JSON: building transformers' video processor needs torchvision, which a CPU install lacks.
"""

import json
from pathlib import Path

from sparsight.media.pixels import PROCESSOR_FILE, PixelSettings


def write_processor(directory: Path, pixels: PixelSettings, patches: int) -> None:
    """Write image, video and combined processor settings into a checkpoint directory.

    `patches` of one picture is what processors compute the number of placeholders from.
    """
    shared = {
        "size": {"height": pixels.side, "width": pixels.side},
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
    }
    picture = shared | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": [[pixels.side, pixels.side]],
        "do_pad": True,
    }
    video = shared | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": patches,
        "vision_feature_select_strategy": "full",
    }
    write = {"preprocessor_config.json": picture, PROCESSOR_FILE: video, "processor_config.json": processor}
    for name, values in write.items():
        (directory / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
