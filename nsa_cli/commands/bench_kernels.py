"""`nsa bench kernels`: the attention kernels on a GPU, checked and timed beside dense attention."""

import json
import os
import time

import click

from nsa_cli.commands.options import verbosity_options
from nsa_cli.kernel_cases import Case, Shape, cases
from nsa_cli.kernel_goals import PARTS, part_cases
from nsa_cli.units import parse_quantity
from nsa_kernels import Variant
from nsa_models.errors import CheckError, NSAError

SCHEMA_VERSION = 1
SHAPES = "64x4x128,64x4x192/128,9x3x64,64x64x128,64x32x128,63x21x128,63x9x128"  # groups of 16, 16, 3, 1, 2, 3, 7


def parse_numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    return sorted({parse_quantity(number) for number in value.split(",")})


def parse_shapes(context: click.Context, parameter: click.Parameter, value: str) -> list[Shape]:
    try:
        return [Shape.parse(shape) for shape in value.split(",")]
    except ValueError:
        raise click.BadParameter("write shapes as 64x4x128 or 64x4x192/128: query heads, key heads, widths") from None


def parse_variant(context: click.Context, parameter: click.Parameter, value: str) -> Variant:
    try:
        block, stride, select, count, window = (int(number) for number in value.split(","))
        return Variant(block, stride, select, count, window=window)
    except ValueError as error:
        raise click.BadParameter(f"{value}: {error}") from None


@click.command("kernels")
@click.option(
    "--lengths",
    default="8Ki,64Ki",
    show_default=True,
    callback=parse_numbers,
    metavar="TOKENS,...",
    help="Of a sequence.",
)
@click.option(
    "--shape", "shapes", default=SHAPES, show_default=True, callback=parse_shapes, metavar="HEADS,...",
    help="Query heads x key heads x width, /width of values.",
)  # fmt: skip
@click.option(
    "--batches", default="1,16,64", show_default=True, callback=parse_numbers, metavar="N,...",
    help="Sequences of a decode step.",
)  # fmt: skip
@click.option(
    "--variant", default="32,16,64,16,512", show_default=True, callback=parse_variant, metavar="L,D,S,N,W",
    help="Compression block and stride, selection block and count, window.",
)  # fmt: skip
@click.option(
    "--part", type=click.Choice([*PARTS]), help="Cases that belong together, in place of --lengths, --shape, --batches."
)
@click.option("--minutes", type=click.FloatRange(0), help="Begin no case after that; it is recorded as skipped.")
@click.option("--case", "wanted", multiple=True, help="Only cases whose name contains this; repeatable.")
@click.option("--list", "only_list", is_flag=True, help="Print the names of the cases.")
@click.option("--check", "only_check", is_flag=True, help="Compare with float64 only, without timing.")
@click.option(
    "--device", type=click.Choice(["cuda", "interpreter"]), default="cuda", show_default=True,
    help="The interpreter takes tiny sizes on a CPU; its times mean nothing.",
)  # fmt: skip
@verbosity_options
def command(lengths, shapes, batches, variant, part, minutes, wanted, only_list, only_check, device) -> None:
    """Check the attention kernels against float64, then time them beside PyTorch's attention and a dense Triton kernel.

    One JSON object per case on stdout, as soon as it is done: forward and backward of one sequence, decode steps of
    full caches and of ragged ones, and a sequence whose offsets pass 2^31. A backend that does not take a shape is
    null. A case that fails its check is not timed: the others go on, exit code 6.

    \b
      nsa bench kernels --list
      nsa bench kernels --check --shape 64x4x128
      nsa bench kernels --part forward --minutes 8 | tee gpu/forward.jsonl
      nsa bench kernels --case decode-b16-65536 --case forward-65536
      nsa bench kernels --device interpreter --lengths 100 --shape 6x2x32 --case forward-100
    """
    every = part_cases(part, device != "cuda") if part else cases(lengths, shapes, batches)
    every = [case for case in every if device == "cuda" or not case.kind.startswith("overflow")]
    chosen = [case for case in every if not wanted or any(part in case.name for part in wanted)]
    if not chosen:
        raise click.UsageError("no case has that in its name; --list shows them")
    if only_list:
        click.echo("\n".join(case.name for case in chosen))
        return
    if device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is defined, which is below
    import torch

    from nsa_cli.kernel_bench import Timer, machine
    from nsa_cli.kernel_check import Check

    if device == "cuda" and not torch.cuda.is_available():
        raise NSAError("no GPU was found; --device interpreter checks the kernels at tiny sizes without one")
    # The interpreter gets products of bfloat16 wrong.
    place, dtype = ("cuda", torch.bfloat16) if device == "cuda" else ("cpu", torch.float32)
    on = (torch.device(place), dtype, variant)
    check, timer, failed, start = Check(*on), Timer(*on), [], time.monotonic()
    for case in chosen:
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            click.echo(json.dumps(about(case) | {"skipped": "out of time"} | machine(*on[:2])))
            continue
        try:
            record = {"check": check.run(case)}
            if not only_check and not case.kind.startswith("overflow"):
                record |= timer.run(case)
        except torch.OutOfMemoryError:
            record = {"skipped": "out of memory"}
        except Exception as error:  # a kernel that does not compile or launch is this case's result; the others go on
            failed.append(case.name)
            record = {"failed": str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"}
        click.echo(json.dumps(about(case) | record | machine(*on[:2])))
        if place == "cuda":
            torch.cuda.empty_cache()
    if failed:
        raise CheckError(f"{len(failed)} of {len(chosen)} cases failed: {', '.join(failed)}")


def about(case: Case) -> dict:
    known = {"case": case.name, "kind": case.kind, "tokens": case.tokens, "shape": str(case.shape)}
    return {"schema_version": SCHEMA_VERSION} | known | ({"batch": case.batch} if case.batch else {})
