"""Turn videos into training data: `python -m smp.prepare clips|embeddings SOURCE OUT`; see `smp/TRAINING.md`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from .encoder import PAPER_MODEL, load_open_clip
from .training.config import TrainConfig, load_config
from .training.data.captions import read_captions
from .training.data.clip_files import Encode, as_embeddings, as_pictures
from .training.data.prepare import Source, prepare, shard_source, video_source
from .training.data.shards import INDEX, ShardReader
from .training.data.videos import ClipShape, RawClip, list_videos
from .training.run.start import start_smp, token_space


def main() -> int:
    """Run the command line; 0 when the shards of this call are written."""
    arguments = parse_arguments(sys.argv[1:])
    try:
        source = open_source(arguments)
        part = parse_part(arguments.part)
        about: dict[str, Any] = {"kind": arguments.kind, "frames": source.frames}
        encode: Encode = as_pictures
        computed: dict[str, Any] = {}
        if arguments.kind == "embeddings":
            encode, encoded, computed = embedding_encoder(arguments, load_config(arguments.config))
            about |= encoded
        if not prepare(source, arguments.out, encode, about, computed, part):
            print("This part is done; the index is written when all parts are.")
    except ValueError as error:
        print(f"smp.prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsmp.prepare: interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    defaults = ClipShape()
    parser = argparse.ArgumentParser(prog="smp.prepare", description=(__doc__ or "").split(":")[0] + ".")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="clips|embeddings")
    for kind, words_of_help in (("clips", "store frames as JPEG"), ("embeddings", "store what training reads")):
        command = kinds.add_parser(kind, help=words_of_help)
        command.add_argument("source", type=Path, help="a folder of videos, or (embeddings) of shards of clips")
        command.add_argument("out", type=Path, help="folder for the shards")
        command.add_argument("--captions", type=Path, help="CSV with columns video, caption; default: NAME.txt")
        for name in ("frames", "stride", "size", "clips_per_video"):
            option = f"--{name.replace('_', '-')}"
            command.add_argument(option, type=int, default=getattr(defaults, name), help="default: %(default)s")
        command.add_argument("--videos-per-shard", type=int, default=256, help="default: %(default)s")
        command.add_argument("--part", default="0/1", metavar="I/N", help="do every N-th shard from the I-th")
        if kind == "embeddings":
            command.add_argument("--config", type=Path, required=True, help="the run's config: its token space")
            command.add_argument("--encoder", type=Path, required=True, help="open_clip weights file")
            command.add_argument("--encoder-model", default=PAPER_MODEL, help="default: %(default)s")
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def open_source(arguments: argparse.Namespace) -> Source:
    """Videos or shards of clips, whichever the folder holds."""
    if arguments.kind == "embeddings" and (arguments.source / INDEX).is_file():
        return shard_source(ShardReader(str(arguments.source)))
    shape = ClipShape(arguments.frames, arguments.stride, arguments.size, arguments.clips_per_video)
    captions = read_captions(arguments.captions) if arguments.captions else {}
    if arguments.videos_per_shard < 1:
        raise ValueError(f"--videos-per-shard is {arguments.videos_per_shard}; it must be at least 1.")
    return video_source(arguments.source, list_videos(arguments.source), captions, shape, arguments.videos_per_shard)


def embedding_encoder(
    arguments: argparse.Namespace, config: TrainConfig
) -> tuple[Encode, dict[str, Any], dict[str, Any]]:
    """Tokens, and with `sd15` in the config latents and text too; what the index says of them; what it computes."""
    # diffusers takes seconds to import
    from .training.data.encode import ClipEncoder, SD15Encoder, TokenEncoder, encoding_precision

    device = torch.device(arguments.device)
    precision = encoding_precision(config, device)
    motion, _ = start_smp(config)
    space = token_space(motion)
    encoders: list[ClipEncoder] = [
        TokenEncoder(load_open_clip(arguments.encoder, arguments.encoder_model), motion, device, precision)
    ]
    if config.sd15:
        encoders.append(SD15Encoder(Path(config.sd15), device, precision))
    weights = {name: digest for encoder in encoders for name, digest in encoder.weights().items()}
    blank = {name: value.tolist() for encoder in encoders for name, value in encoder.blank().items()}

    def encode(clip: RawClip) -> dict[str, Any]:
        return as_embeddings(clip, {k: v for encoder in encoders for k, v in encoder.encode(clip).items()})

    return encode, {"space": space, "weights": weights}, {"blank": blank}


def parse_part(text: str) -> tuple[int, int]:
    """'I/N' -> (I, N); ValueError unless 0 <= I < N."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ValueError(f"--part is {text!r}; it must be I/N with I from 0 to N - 1, such as 0/8.")
    return int(first), int(count)


if __name__ == "__main__":
    sys.exit(main())
