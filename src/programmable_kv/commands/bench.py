"""`pkv bench`: measures speed against what a user would do instead."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from programmable_kv.commands.common import ModelOption, OutOption, command, progress, record_path
from programmable_kv.commands.measure import (
    DtypeOption,
    LengthsOption,
    RepeatsOption,
    load,
    measure,
    named,
    parse_lengths,
    print_summary,
)
from programmable_kv.errors import InvalidArgumentError

if TYPE_CHECKING:
    from programmable_kv.records import Record

app = typer.Typer(
    help="How fast: benches against what a user would do instead.", no_args_is_help=True, rich_markup_mode=None
)


class VllmPart(StrEnum):
    """What `pkv bench serve-vllm` measures."""

    LOAD = "load"
    DECISIONS = "decisions"
    SKILLS = "skills"
    REPLAY = "replay"


ShapeOption = Annotated[
    str | None,
    typer.Option(
        help="measure random weights of this architecture (llama-3.1-8b, for example) instead of a model; no download"
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="a torch device; by default the one that torch prefers")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="build only this many layers of the --shape")]
_ALL_LENGTHS = "512,1024,2048,4096,7936"


@app.command("edit")
def bench_edit(
    model: ModelOption = "embedded",
    shape: ShapeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    lengths: LengthsOption = _ALL_LENGTHS,
    repeats: RepeatsOption = 7,
    out_path: OutOption = None,
) -> None:
    """Measure the time to first token after an edit, by edit mode and context length.

    It is compared with a full prefill, with cloning a cache and appending to it, and with a bare forward.
    """
    from programmable_kv.bench.edit import run

    _measure_lengths(run, "edit-ttft", model, shape, layers, device, dtype, lengths, repeats, out_path)


@app.command("splice")
def bench_splice(
    model: ModelOption = "embedded",
    shape: ShapeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    lengths: LengthsOption = _ALL_LENGTHS,
    repeats: RepeatsOption = 7,
    out_path: OutOption = None,
) -> None:
    """Measure the time to first token after a skill is spliced in, by the skill's length.

    It is compared with a full prefill, with concatenating cached tensors, and with a plain copy of the same bytes.
    """
    from programmable_kv.bench.splice import run

    _measure_lengths(run, "splice-ttft", model, shape, layers, device, dtype, lengths, repeats, out_path)


@app.command("agent")
def bench_agent(
    model: ModelOption = "embedded",
    instances: Annotated[int, typer.Option(min=0, help="policies for each held-out domain")] = 10,
    lengths: LengthsOption = "1024,2048,4096",
    turns: Annotated[int, typer.Option(min=1, help="turns for each held-out policy")] = 6,
    timed_turns: Annotated[int, typer.Option(min=1, help="turns for each timed policy")] = 12,
    mode: Annotated[
        list[str], typer.Option(help="an agent's edit mode, or 'design'; repeatable, the first one is timed")
    ] = [  # noqa: B006
        "field_erratum",
        "erratum",
    ],
    times: Annotated[bool, typer.Option(help="also measure times, at the given lengths")] = True,
    out_path: OutOption = None,
) -> None:
    """Compare an agent on one live cache with an agent that prefills its whole context in every turn.

    The record has how often each decides right, and how much sooner the first answer token comes.
    """
    from programmable_kv.bench.agent import parse_way, run
    from programmable_kv.scenarios.vocabulary import held_out_domains

    sizes, modes = parse_lengths(lengths) if times else [], [parse_way(each) for each in mode]
    total = instances * len(held_out_domains()) + len(sizes)
    loaded = load(model)
    measure(
        run, loaded, out_path, named("agent", loaded), "Policies", total,
        instances=instances, lengths=sizes, turns=turns, timed_turns=timed_turns, modes=modes,
    )  # fmt: skip


@app.command("endurance")
def bench_endurance(
    model: ModelOption = "embedded",
    edits: Annotated[int, typer.Option(min=1, help="edits of five fields in turn")] = 200,
    out_path: OutOption = None,
) -> None:
    """Make hundreds of edits on one cache, and compare its decisions with a full prefill's.

    The record has tokens, times and memory after each edit.
    """
    from programmable_kv.bench.endurance import run

    loaded = load(model)
    measure(run, loaded, out_path, named("endurance", loaded), "Edits", edits, edits=edits)


@app.command("overhead")
def bench_overhead(
    lengths: LengthsOption = "4096,16384,65536",
    units: Annotated[
        str, typer.Option(help="number of messages in the context of each length, separated by commas")
    ] = "100,400,1000",
    repeats: RepeatsOption = 7,
    out_path: OutOption = None,
) -> None:
    """Measure how much time every public operation takes in addition to its forward.

    The model is tiny and random, so nothing is downloaded.
    """
    from programmable_kv.bench.overhead import model_for, run

    sizes, counts = parse_lengths(lengths), parse_lengths(units, "--units")
    if len(sizes) != len(counts):
        raise typer.BadParameter(
            f"{len(counts)} numbers for {len(sizes)} lengths: give one for each", param_hint="--units"
        )
    measure(
        run, model_for(sizes), out_path, "overhead", "Lengths", len(sizes), lengths=sizes, units=counts, repeats=repeats
    )


@app.command("serve")
def bench_serve(
    sizes: Annotated[str, typer.Option(help="sizes of a request's body in KB, separated by commas")] = "8,100,450",
    sessions: Annotated[
        str, typer.Option(help="idle conversations that a gateway knows while requests arrive, separated by commas")
    ] = ("10,1000,10000"),
    per_second: Annotated[float, typer.Option(min=0.1, help="requests that arrive per second")] = 50.0,
    open_seconds: Annotated[
        float, typer.Option(min=0.1, help="seconds of arriving requests, for each way and number of conversations")
    ] = 10.0,
    requests: Annotated[
        int, typer.Option(min=2, help="timed requests for each way and size, sent one at a time")
    ] = 150,
    seconds: Annotated[float, typer.Option(min=0.1, help="seconds of load for each way, twice for each size")] = 1.0,
    litellm_python: Annotated[
        str | None,
        typer.Option(
            "--litellm-python", help="the Python of an environment with litellm[proxy], to measure it as well"
        ),
    ] = None,
    out_path: OutOption = None,
) -> None:
    """Measure how much time the gateway adds to a request, and how much memory it takes.

    The added time is measured while requests arrive, by number of conversations, and one request at a time, by gateway
    mode and body size. Needs no model and no download.
    """
    from programmable_kv.extras import require_extra

    require_extra("serve", "starlette", "uvicorn", "httptools", "prometheus_client")
    from programmable_kv.bench.serve import run, steps_of

    sizes_kb, counts = parse_lengths(sizes, "--sizes"), parse_lengths(sessions, "--sessions")
    path = record_path(out_path, "serve")
    said = (
        command().replace(litellm_python, "LITELLM_PYTHON") if litellm_python else command()
    )  # a record names no place
    with progress("Steps", steps_of(sizes_kb, counts)) as report:
        record = run(
            path, sizes_kb=sizes_kb, sessions=counts, per_second=per_second, open_seconds=open_seconds, requests=requests,
            seconds=seconds, litellm_python=litellm_python, report=report, command=said,
        )  # fmt: skip
    print_summary(record)


@app.command("vllm")
def bench_vllm(
    python: Annotated[str, typer.Option("--python", help="the Python of an environment with vLLM (docs/vllm.md)")],
    model: ModelOption = "embedded",
    lines: Annotated[
        int, typer.Option(min=4, help="lines of each of the eight policies; a line has about 21 tokens")
    ] = 16,
    requests: Annotated[
        int, typer.Option(min=0, help="timed prompts for each way; 0 only compares answers and provokes faults")
    ] = 6,
    out_path: OutOption = None,
) -> None:
    """Measure skills that are composed inside a real vLLM, against its prefix cache.

    The run checks that the result equals the library's own splice, and that faulty skills are refused. It measures how
    much sooner the first token comes.
    """
    from programmable_kv.bench.vllm_splice import STEPS, run

    path = record_path(out_path, "vllm-splice")
    with progress("Engines", STEPS) as report:
        record = run(
            python, path, model=model, lines=lines, requests=requests, report=report,
            command=command().replace(python, "VLLM_PYTHON"),  # a record names no place
        )  # fmt: skip
    print_summary(record)


@app.command("serve-vllm")
def bench_serve_vllm(
    python: Annotated[str, typer.Option("--python", help="the Python of an environment with vLLM (docs/vllm.md)")],
    part: Annotated[VllmPart, typer.Option(help="what to measure: load, decisions, skills or replay")] = VllmPart.LOAD,
    model: Annotated[str, typer.Option("--model", help="'embedded', or a folder that vLLM serves")] = "embedded",
    quick: Annotated[
        bool, typer.Option("--quick", help="a short run of at most three minutes, to see that it works")
    ] = False,
    traces: Annotated[
        Path | None, typer.Option(help="a folder of agent traces (kv-cache-tester), for the replay")
    ] = None,
    out_path: OutOption = None,
) -> None:
    """Measure a real vLLM with and without the gateway.

    The option --part chooses what is measured: prompts with a clock under load (load), decisions (decisions), skills
    (skills), or the replay of agent traces (replay). The load takes about an hour on two cores. Run the same command
    again to continue an interrupted run.
    """
    from programmable_kv.extras import require_extra

    require_extra("serve", "starlette", "uvicorn", "httptools", "prometheus_client")
    from programmable_kv.bench import serve_vllm, serve_vllm_decisions, serve_vllm_replay, serve_vllm_skills

    if (part is VllmPart.REPLAY) != (traces is not None):
        raise InvalidArgumentError("--part replay needs --traces FOLDER, and no other part takes it")
    path = record_path(out_path, "serve-vllm" if part is VllmPart.LOAD else f"serve-vllm-{part}")
    said = command().replace(python, "VLLM_PYTHON").replace(str(traces), "TRACES")  # a record names no place
    with progress("Steps", 1) as report:
        if part is VllmPart.LOAD:
            policies = serve_vllm.QUICK if quick else serve_vllm.POLICIES
            record = serve_vllm.run(
                python, path, model=model, policies=policies, report=report, tell=typer.echo, command=said
            )
        elif part is VllmPart.DECISIONS:
            count = serve_vllm_decisions.QUICK if quick else serve_vllm_decisions.COUNT
            record = serve_vllm_decisions.run(python, path, model=model, count=count, report=report, command=said)
        elif part is VllmPart.SKILLS:
            sizes = (
                {"lines": serve_vllm_skills.QUICK_LINES, "requests": serve_vllm_skills.QUICK_REQUESTS} if quick else {}
            )
            record = serve_vllm_skills.run(python, path, model=model, report=report, command=said, **sizes)
        else:
            assert traces is not None, "checked above"
            most = serve_vllm_replay.QUICK if quick else serve_vllm_replay.MOST
            record = serve_vllm_replay.run(python, path, traces, model=model, most=most, report=report, command=said)
    print_summary(record)


@app.command("soak")
def bench_soak(
    minutes: Annotated[float, typer.Option(min=0.01, help="minutes of load")] = 30.0,
    stretches: Annotated[
        int, typer.Option(min=1, help="rows of the record; each covers an equal part of the time")
    ] = 15,
    clients: Annotated[int, typer.Option(min=1, help="conversations at the same time")] = 8,
    per_second: Annotated[float, typer.Option(min=0.1, help="requests per second, of all clients together")] = 20.0,
    kills: Annotated[int, typer.Option(min=0, help="how often the gateway is killed and started again")] = 5,
    rebase_after: Annotated[int, typer.Option(min=1, help="appended lines after which a prefix is renewed")] = 12,
    observe_mib: Annotated[
        int, typer.Option(min=1, help="text of earlier requests that the gateway keeps, in MiB")
    ] = 8,
    gateways: Annotated[
        int, typer.Option(min=1, help="number of gateways, killed in turn; several need a database")
    ] = 1,
    state: Annotated[str, typer.Option(help="a database for the state: postgresql://USER@HOST/DATABASE")] = "",
    editors: Annotated[int, typer.Option(min=0, help="clients that edit a notebook and look for lost edits")] = 0,
    database_kills: Annotated[
        int,
        typer.Option(
            min=0, help="how often the run kills a database of its own (needs a PostgreSQL server's programs)"
        ),
    ] = 0,
    out_path: OutOption = None,
) -> None:
    """Put a gateway under load for a long time, and kill it now and then.

    The record has the cache's hit rate, latency, memory, and values that were lost. Needs no model.
    """
    from programmable_kv.extras import require_extra

    require_extra("serve", "starlette", "uvicorn", "httptools", "prometheus_client")
    if database_kills:
        require_extra("postgres", "psycopg")
    from programmable_kv.bench.soak import run

    path = record_path(out_path, "soak")
    with progress("Stretches", stretches) as report:
        record = run(
            path, minutes=minutes, stretches=stretches, clients=clients, per_second=per_second, kills=kills,
            rebase_after=rebase_after, observe_mib=observe_mib, gateways=gateways, state=state, editors=editors,
            database_kills=database_kills, report=report,
            command=command().replace(state, "postgresql://USER@HOST/DATABASE") if state else command(),  # no password
        )  # fmt: skip
    print_summary(record)


def _measure_lengths(
    run: Callable[..., Record],
    name: str,
    model: str,
    shape: str | None,
    layers: int | None,
    device: str | None,
    dtype: str,
    lengths: str,
    repeats: int,
    out_path: Path | None,
) -> None:
    sizes = parse_lengths(lengths)
    more: dict[str, Any] = {}
    if shape is None:
        if layers is not None:
            raise typer.BadParameter("only a --shape can be built with fewer layers", param_hint="--layers")
        loaded = load(model, dtype=dtype, device=device)
        name = named(name, loaded)
    else:
        from programmable_kv.bench.shapes import load_shape, settings_of
        from programmable_kv.records import record_slug

        loaded = load_shape(shape, device=device, dtype=dtype, layers=layers)
        name = f"{name}-{record_slug(shape)}"
        more["settings"] = settings_of(loaded)
    measure(run, loaded, out_path, name, "Lengths", len(sizes), lengths=sizes, repeats=repeats, **more)
