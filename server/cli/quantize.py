"""`loramux quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.connection import AsJson
from server.cli.console import console, report, show_json
from server.errors import ServerError

__all__ = ["quantize"]

DEMO = "demo"


def quantize(
    model: Annotated[str, typer.Argument(help='"demo", a local Hugging Face model folder, or a GGUF file.')],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    kind: Annotated[str, typer.Option("--quantization", help='"nf4", "fp4" or "int8".')] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="With 4 bits, hold their scales in 8 bits.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help='Of all else: "float32", "bfloat16" or "float16".')] = (
        "bfloat16"
    ),
    device: Annotated[str, typer.Option("--device", help='"cpu", "cuda" ...')] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Save a quantized copy of a model, which `loramux serve --model FOLDER` starts from at once."""
    if kind not in ("nf4", "fp4", "int8"):
        raise typer.BadParameter(f"{kind!r}: nf4, fp4 or int8", param_hint="--quantization")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r}: float32, bfloat16 or float16", param_hint="--dtype")
    import torch  # noqa: PLC0415 - `loramux --help` need not load torch

    from server.demo.model import ensure_demo_model  # noqa: PLC0415
    from server.engine import Quantization, save_quantized  # noqa: PLC0415
    from server.gguf import ensure_unpacked, find_gguf  # noqa: PLC0415

    try:
        source = ensure_demo_model(report=report) if model == DEMO else Path(model).expanduser()
        if (gguf := find_gguf(source)) is not None:
            source = ensure_unpacked(gguf, dtype, report=report)
        num_bytes = save_quantized(
            source,
            out,
            Quantization(kind, double_quant),  # type: ignore[arg-type]
            dtype=getattr(torch, dtype),
            device=torch.device(device),
        )
    except ServerError as error:
        console.print(f"[red]error[/red] {error.message} [dim]({error.code})")
        raise typer.Exit(1) from None
    if as_json:
        show_json({"folder": str(out), "num_bytes": num_bytes})
        return
    console.print(f"{out}: {num_bytes / 1e6:.0f} MB of weights")
