"""The `dormouse` command: verbs only, each a thin layer over one function of the package.

Results go to stdout, progress and errors to stderr. Every verb takes `--data-dir`, and `--json` where it has a result;
`--quiet` silences progress. Exit codes are those of errors.py (2: usage or configuration, 3: not found, ...).
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

import dormouse
from dormouse.admin_client import ask_node
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import ConfigError, DormouseError, HostError, NotFoundError
from dormouse.progress import Reporter
from dormouse.transfer.memory import keep_freed_memory

INTERNAL_ERROR = 70
LONGEST_JSON = 64 << 20

out = Console()
err = Console(stderr=True)


def common(function: Callable[..., None]) -> Callable[..., None]:
    """The options every verb has: --data-dir, --json, --quiet."""

    @click.option("--data-dir", type=click.Path(path_type=Path), help="Data folder.  [env: DORMOUSE_HOME]")
    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
    @functools.wraps(function)
    def wrapper(data_dir: Path | None, as_json: bool, quiet: bool, **rest: Any) -> None:
        folder = DataDir(data_dir or default_data_dir(os.environ))
        function(data_dir=folder, as_json=as_json, reporter=Reporter(err, silent=quiet or as_json), **rest)

    return wrapper


def emit(value: object) -> None:
    """A JSON result."""
    click.echo(json.dumps(value, indent=2, default=str))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(dormouse.__version__, prog_name="dormouse")
def cli() -> None:
    """Serve large models that sleep when nobody asks for them and wake in about a second."""


@cli.command()
@click.argument("sources", metavar="CONFIG.yaml | NAME...", nargs=-1, required=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Data folder.  [env: DORMOUSE_HOME]")
@click.option("--host", help="Address to listen on.  [env: DORMOUSE_HOST]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.  [env: DORMOUSE_PORT]")
@click.option(
    "--api-keys-file",
    type=click.Path(path_type=Path),
    help="File of lines KEY or KEY TENANT.  [env: DORMOUSE_API_KEYS_FILE]",
)
@click.option("--keep-alive", help="For models named here: how long an idle one stays, such as 5m or forever.")
@click.option("--log-level", help="debug, info, warning or error.  [env: DORMOUSE_LOG_LEVEL]")
def serve(sources: tuple[str, ...], keep_alive: str | None, **flags: Any) -> None:
    """Serve models over an OpenAI-compatible API.

    Takes one configuration file (ends in .yaml or .yml), or the names of imported models to serve with default
    settings.
    """
    from dormouse.config import load_config
    from dormouse.gateway.server import run_server

    files = [source for source in sources if source.endswith((".yaml", ".yml"))]
    names = [source for source in sources if source not in files]
    if len(files) > 1 or (files and names):
        raise click.UsageError("give one configuration file, or model names, not both")
    models = {name: {"keep_alive": keep_alive} if keep_alive is not None else {} for name in names}
    if files and keep_alive is not None:
        raise click.UsageError("--keep-alive goes with model names; in a configuration file each model has its own")
    config = load_config(Path(files[0]) if files else None, flags=flags, models=models)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    sys.exit(run_server(config))


@cli.command("import")
@click.argument("source")
@click.option("--name", required=True, help="The name to serve it under.")
@click.option("--replace", is_flag=True, help="Replace a model of that name; its snapshots become unusable.")
@click.option("--base", help="Of an adapter: the imported model it is for.  [default: as its configuration says]")
@common
def import_(
    source: str, name: str, replace: bool, base: str | None, data_dir: DataDir, as_json: bool, reporter: Reporter
) -> None:
    """Import a model: a Hugging Face folder, safetensors files, a GGUF file, or `smollm2-135m`.

    A folder with adapter_config.json is imported as a LoRA adapter of a model that is imported already.
    """
    from dormouse import catalogue
    from dormouse.checkpoint.importer import import_model

    data_dir.create()
    with reporter:
        model = import_model(source, name, data_dir, progress=reporter.progress, replace=replace, base=base)
    if as_json:
        emit(catalogue.model_json(model))
    elif model.base is not None:
        out.print(
            f"Imported [bold]{escape(model.name)}[/], an adapter of {escape(model.base)}: "
            f"{model.parameters / 1e6:.1f} M parameters, {catalogue.human(model.weight_bytes)}"
        )
    else:
        out.print(
            f"Imported [bold]{escape(model.name)}[/]: {model.parameters / 1e6:.0f} M parameters, "
            f"{catalogue.human(model.weight_bytes)} of weights"
        )


@cli.command()
@click.argument("name")
@click.option("--device", "devices", multiple=True, default=["cpu"], show_default=True, help="cpu or cuda:N; several.")
@click.option("--tensors", multiple=True, metavar="PATTERN", help="Only tensors whose names match.  [default: all]")
@common
def load(
    name: str, devices: tuple[str, ...], tensors: tuple[str, ...], data_dir: DataDir, as_json: bool, reporter: Reporter
) -> None:
    """Load a model's weights into memory, tell how fast that went, and let go of them."""
    from dormouse import catalogue

    try:
        from dormouse.checkpoint import load as loading
    except ImportError as error:
        raise HostError(
            f"loading needs a package that is missing: {error.name}",
            remedy="Install it: pip install 'dormouse[transformers]'",
        ) from error
    with reporter:
        result = loading.measured(name, devices, tensors or None, data_dir, reporter.amount("load"))
    if as_json:
        emit(result)
        return
    places = (("past the page cache", "direct_bytes"), ("through it", "cached_bytes"), ("from memory", "tier_bytes"))
    read = ", ".join(f"{catalogue.human(result[key])} {words}" for words, key in places if result[key])
    out.print(
        f"Loaded [bold]{escape(name)}[/]: {result['tensors']} tensors, {catalogue.human(result['plain_bytes'])} in "
        f"{result['seconds']:.2f} s, {result['gb_per_second']:.2f} GB/s; read {read or 'nothing'}",
        soft_wrap=True,
    )


def keeper_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of the verbs that run a job."""
    for option in (
        click.option("--name", help="The job's name."),
        click.option(
            "--net", "network", type=click.Choice(["own", "host"]), help="A network of its own, or the host's."
        ),
        click.option("--publish", "-p", multiple=True, metavar="[HOST:]PORT[:INNER]", help="Forward a TCP port to it."),
        click.option("--detach", "-d", is_flag=True, help="Return once it runs; its output goes to a log."),
    ):
        function = option(function)
    return function


def tell(quiet: bool) -> Callable[[str], None]:
    """Words about a job, on stderr so that its own output stays clean. That nobody reads them harms no job."""
    from dormouse.jobs.streams import say

    return lambda text: None if quiet else say(2, text)


@cli.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.argument("argv", metavar="-- CMD...", nargs=-1, required=True)
@keeper_options
@click.option("--tmpfs", multiple=True, metavar="FOLDER", help="A tmpfs of its own here, kept in snapshots, too.")
@common
def run(
    argv: tuple[str, ...], name: str | None, network: Any, publish: tuple[str, ...], detach: bool,
    tmpfs: tuple[str, ...], data_dir: DataDir, as_json: bool, reporter: Reporter,
) -> None:  # fmt: skip
    """Run a program so that it can be captured and restored. Exits with its exit status."""
    from dormouse.jobs import launch

    place = launch.Place(name, network, publish, detach)
    words = launch.Words(tell(reporter.silent), emit if as_json else None)
    sys.exit(launch.run_job(data_dir, argv, place, tmpfs, words))


@cli.command()
@click.argument("target", metavar="NAME|PID")
@click.option("--leave-running", is_flag=True, help="The program goes on after its capture.")
@click.option("--close-connections", is_flag=True, help="Open TCP connections are closed in the restored program.")
@click.option("--replica", type=int, metavar="NUMBER", help="Which one, when there are several.")
@click.option("--hook-timeout", default=30.0, show_default=True, help="Seconds for the program's own hooks.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds for CRIU.")
@common
def checkpoint(target: str, data_dir: DataDir, as_json: bool, reporter: Reporter, **options: Any) -> None:
    """Capture a job, or any process with all its children, as a snapshot."""
    from dormouse import catalogue
    from dormouse.jobs import launch
    from dormouse.jobs.control import Request

    result = launch.checkpoint(data_dir, target, Request("checkpoint", **options))
    if as_json:
        emit(result)
    else:
        rest = "it runs on" if result["left_running"] else "it has ended"
        out.print(
            f"Captured [bold]{escape(result['name'])}[/] as {result['id']}: {catalogue.human(result['raw_bytes'])}, "
            f"{catalogue.human(result['stored_bytes'])} stored; {rest}",
            soft_wrap=True,
        )


@cli.command()
@click.argument("snapshot_id", metavar="ID")
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(1, 64), help="How many at once.")
@keeper_options
@click.option("--gpu", "gpus", multiple=True, metavar="NUMBER|UUID", help="A GPU to use instead of the captured one.")
@click.option("--hook-timeout", default=30.0, show_default=True, help="Seconds for the program's own hooks.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds for CRIU.")
@common
def restore(
    snapshot_id: str, replicas: int, name: str | None, network: Any, publish: tuple[str, ...], detach: bool,
    gpus: tuple[str, ...], hook_timeout: float, timeout: float, data_dir: DataDir, as_json: bool, reporter: Reporter,
) -> None:  # fmt: skip
    """Bring captured processes back, once or many times. Exits with their exit status."""
    from dormouse.jobs import launch

    place = launch.Place(name, network, publish or None, detach)
    words = launch.Words(tell(reporter.silent), emit if as_json else None)
    seconds = {"timeout": timeout, "hook_timeout": hook_timeout}
    sys.exit(launch.restore_job(data_dir, snapshot_id, place, replicas, words, gpus=gpus, **seconds))


@cli.command("jobs")
@common
def jobs_(data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """List the jobs that run."""
    from dormouse.jobs.control import running_jobs

    running = running_jobs(data_dir)
    if as_json:
        emit(running)
        return
    for job in running:
        pids = ", ".join(str(replica["pid"]) for replica in job.get("replicas", ()))
        words = job.get("error") or " ".join(job["argv"]) + (" (starts)" if job["state"] == "starts" else "")
        out.print(f"{job['name']}  pid {pids or '?'}  {words}", markup=False, highlight=False, soft_wrap=True)


@cli.command()
@click.argument("name")
@click.option("--grace", default=10.0, show_default=True, help="Seconds it gets to end by itself after SIGTERM.")
@common
def stop(name: str, grace: float, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """End a job."""
    from dormouse.jobs.launch import stop_job

    result = stop_job(data_dir, name, grace)
    if as_json:
        emit(result)


@cli.command("ls")
@click.option("--why", is_flag=True, help="How each served model would start next, and when and why it steps down.")
@common
def list_(why: bool, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """List models, snapshots, their sizes and states."""
    from dormouse import catalogue

    listing = catalogue.listing(data_dir)
    if why:
        listing["outlook"] = ask_node(data_dir.run, "GET", "outlook")["data"]
    emit(listing) if as_json else out.print(catalogue.render(listing))


@cli.command()
@click.argument("model")
@common
def explain(model: str, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Show what a request for a served model would get now and why, and how well its latest starts were estimated."""
    from dormouse import catalogue

    details = ask_node(data_dir.run, "GET", "models", model, "explain")
    emit(details) if as_json else out.print(catalogue.render_explanation(details))


class Number(click.ParamType):  # type: ignore[type-arg]
    """A whole number as Python writes it: 4096, 0x1000."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is not a number such as 4096 or 0x1000", param, ctx)


@cli.command()
@click.argument("snapshot_id", metavar="ID")
@click.option("--address", type=Number(), help="Show the memory from here on, such as 0x7f0000001000.")
@click.option("--length", type=Number(), default=256, show_default=True, help="How many bytes of it.")
@click.option("--raw", is_flag=True, help="Write these bytes to stdout as they are.")
@click.option("--maps", is_flag=True, help="Show the mappings of each process, and how much of them is stored.")
@click.option("--pid", type=int, help="Of this process alone; needed for --address when there are several.")
@common
def inspect(
    snapshot_id: str, address: int | None, length: int, raw: bool, maps: bool, pid: int | None,
    data_dir: DataDir, as_json: bool, reporter: Reporter,
) -> None:  # fmt: skip
    """Show what is in a snapshot: its images, sizes, phases and compatibility key; or its memory."""
    from dormouse import catalogue

    if (address is None and raw) or (address is not None and maps):
        raise click.UsageError("--raw goes with --address, and --maps without")
    if as_json and not raw and length > LONGEST_JSON:
        raise click.UsageError(f"--json shows at most {LONGEST_JSON} bytes; --raw has no limit")
    if address is not None:
        show_memory(catalogue.memory(data_dir, snapshot_id, pid, address, length), address, raw, as_json)
    elif maps:
        mappings = catalogue.mappings(data_dir, snapshot_id, pid)
        emit(mappings) if as_json else click.echo("\n".join(catalogue.render_mappings(mappings)))
    else:
        details = catalogue.details(data_dir, snapshot_id)
        emit(details) if as_json else out.print(catalogue.render_details(details))


@cli.command()
@click.argument("target", metavar="MODEL|JOB|ID")
@click.option("--output", type=click.Path(path_type=Path), help="Write a trace for ui.perfetto.dev there.")
@common
def trace(target: str, output: Path | None, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Show step by step what the latest starts and captures of a served model took, of a running job, or the capture
    of a snapshot."""
    from dormouse import catalogue
    from dormouse.trace import chrome_trace

    operations = catalogue.operations(data_dir, target)
    if output is not None:
        write_trace(output, chrome_trace(operations))
    if as_json:
        emit([operation.as_json() for operation in operations])
    elif output is not None:
        out.print(f"Wrote {len(operations)} operations to {escape(str(output))}; open it with ui.perfetto.dev")
    elif operations:
        out.print(catalogue.render_operations(operations))
    else:
        out.print(f"{escape(target)} has not been started yet")


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """As a file of JSON. Raises ConfigError."""
    try:
        path.write_text(json.dumps(trace))
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", remedy="Name another file") from error


def show_memory(parts: Iterator[bytes], address: int, raw: bool, as_json: bool) -> None:
    """Bytes of a snapshot's memory: as they are, as JSON in base64, or as a hex dump."""
    from dormouse.snapshot.pages import hex_lines

    if raw:
        for part in parts:
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
    elif as_json:
        emit({"address": address, "base64": base64.b64encode(b"".join(parts)).decode()})
    else:
        for line in hex_lines(address, parts):
            click.echo(line)


@cli.command()
@click.argument("snapshot_id", metavar="ID")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@common
def export(snapshot_id: str, folder: Path, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Write a snapshot as ordinary CRIU images into a new folder, for `criu restore` and `crit`."""
    from dormouse import catalogue
    from dormouse.snapshot.criu_setup import find_criu
    from dormouse.snapshot.export import export as export_snapshot
    from dormouse.store.store import Store

    with Store.open(data_dir.create().store) as store, reporter:
        identity = catalogue.resolve(store, snapshot_id)
        done = export_snapshot(identity, store, folder, progress=reporter.amount("export"))
    try:
        command = done.command(find_criu(data_dir.root).argv_prefix)
    except HostError:
        command = done.command()  # it is for another machine then
    if as_json:
        ties = [f"{tie.kind}:{tie.inode}" for tie in done.externals]
        emit({"id": identity, "folder": str(done.folder), "images": done.images, "bytes": done.size, "pid": done.pid,
              "externals": ties, "command": command})  # fmt: skip
        return
    out.print(
        f"Wrote {done.images} images, {catalogue.human(done.size)}. Restore them as root where pid {done.pid} is free:"
    )
    click.echo(f"  {command}")
    if done.externals:
        out.print("Before, open the descriptors it names: they take the place of what was outside the snapshot.")


@cli.command("import-images")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", help="A name for it.  [default: that of the folder]")
@click.option(
    "--external", "externals", multiple=True, metavar="socket:INODE|pipe:INODE", help="A descriptor it gets at restore."
)
@common
def import_images_(
    folder: Path, name: str | None, externals: tuple[str, ...], data_dir: DataDir, as_json: bool, reporter: Reporter
) -> None:
    """Take a folder of ordinary CRIU images (of `criu dump`) in as a snapshot."""
    from dormouse import catalogue
    from dormouse.snapshot.compatibility import system_key
    from dormouse.snapshot.criu_setup import find_criu
    from dormouse.snapshot.import_images import import_images, parse_external
    from dormouse.store.store import Store

    key = system_key(gpu=False) | {"criu": find_criu(data_dir.root).version_text}
    ties = [parse_external(text) for text in externals]
    with Store.open(data_dir.create().store) as store, reporter:
        result = import_images(
            folder,
            store,
            name=name or folder.absolute().name,
            key=key,
            machine=platform.machine(),
            externals=ties,
            now=time.time,
            progress=reporter.amount("import"),
        )
    if as_json:
        emit({"id": result.snapshot_id, "raw_bytes": result.raw_bytes, "stored_bytes": result.stored_bytes})
    else:
        sizes = f"{catalogue.human(result.raw_bytes)}, {catalogue.human(result.stored_bytes)} stored"
        out.print(
            f"Imported as {result.snapshot_id}: {sizes}. Its compatibility key is this machine's: nothing is known of "
            "the one it was made on."
        )


@cli.command()
@click.argument("targets", metavar="ID...", nargs=-1, required=True)
@click.option("--model", "is_model", is_flag=True, help="The arguments are model names; their snapshots go too.")
@click.option("--force", is_flag=True, help="Remove pinned snapshots, too.")
@common
def rm(
    targets: tuple[str, ...], is_model: bool, force: bool, data_dir: DataDir, as_json: bool, reporter: Reporter
) -> None:
    """Remove snapshots, or with --model whole models, and free their disk space."""
    from dormouse import catalogue
    from dormouse.checkpoint.models import list_models, open_model, remove_model
    from dormouse.checkpoint.writer import sweep
    from dormouse.snapshot.capture import SNAPSHOT_KIND
    from dormouse.store.store import Store

    targets = tuple(dict.fromkeys(targets))
    orphans: list[str] = []
    with Store.open(data_dir.create().store) as store:
        if is_model:
            for name in targets:
                catalogue.refuse_if_served(data_dir, name)
                open_model(data_dir.models, name)
            snapshots = [row.id for name in targets for row in store.manifests(kind=SNAPSHOT_KIND, name=name)]
        else:
            snapshots = list(dict.fromkeys(catalogue.resolve(store, target) for target in targets))
        if not force:
            catalogue.refuse_pinned(store, snapshots)
        # All targets are known to be there by now: either everything goes or nothing does.
        for name in targets if is_model else ():
            remove_model(data_dir.models, name)
        if is_model:
            orphans = [model.name for model in list_models(data_dir.models) if model.base in targets]
            sweep(store, data_dir.models)
        for snapshot in snapshots:
            store.remove(snapshot)
        report = store.collect_garbage()
    removed = list(targets) if is_model else snapshots
    if as_json:
        emit({"removed": removed, "freed_bytes": report.freed_bytes, "adapters_without_base": orphans})
        return
    out.print(f"Removed {', '.join(map(escape, removed))}; {catalogue.human(report.freed_bytes)} freed")
    if orphans:
        left = ", ".join(map(escape, orphans))
        err.print(f"[yellow]warning:[/] left without their base: {left}", highlight=False, soft_wrap=True)


@cli.command()
@click.argument("model")
@common
def snapshot(model: str, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Have the running node capture a model as soon as it is idle. The model then sleeps."""
    with reporter:
        reporter.step(f"waiting until {model} is captured")
        status = ask_node(data_dir.run, "POST", "models", model, "snapshot")
    emit(status) if as_json else out.print(f"Model {escape(model)} is captured as {status['snapshot_id']}")


@cli.command()
@click.argument("model")
@click.option("--keep", is_flag=True, help="Its process may stay in memory, without weights.")
@common
def sleep(model: str, keep: bool, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Have the running node put a model to sleep as soon as it is idle, and free its memory."""
    with reporter:
        reporter.step(f"waiting until {model} is asleep")
        status = ask_node(data_dir.run, "POST", "models", model, "doze" if keep else "sleep")
    emit(status) if as_json else out.print(f"Model {escape(model)} is {status['state']}")


@cli.command()
@click.argument("model")
@common
def wake(model: str, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Have the running node start a model, which then stays for its keep-alive."""
    with reporter:
        reporter.step(f"waiting until {model} is ready")
        status = ask_node(data_dir.run, "POST", "models", model, "wake")
    emit(status) if as_json else out.print(f"Model {escape(model)} is {status['state']} ({status['start']} s)")


@cli.command()
@click.argument("snapshot_id", metavar="ID")
@common
def pin(snapshot_id: str, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Keep a snapshot when newer ones come; `rm` then needs --force."""
    from dormouse import catalogue

    identity = catalogue.pin(data_dir, snapshot_id, True)
    emit({"id": identity, "pinned": True}) if as_json else out.print(f"Snapshot {identity} is pinned")


@cli.command()
@click.argument("snapshot_id", metavar="ID")
@common
def unpin(snapshot_id: str, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Let a pinned snapshot go when a newer one comes."""
    from dormouse import catalogue

    identity = catalogue.pin(data_dir, snapshot_id, False)
    emit({"id": identity, "pinned": False}) if as_json else out.print(f"Snapshot {identity} is no longer pinned")


@cli.command()
@click.argument("snapshot_id", metavar="ID")
@common
def release(snapshot_id: str, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Lift a snapshot's quarantine: it may be used again."""
    from dormouse import catalogue

    identity = catalogue.release(data_dir, snapshot_id)
    emit({"id": identity, "quarantine": None}) if as_json else out.print(f"Snapshot {identity} may be used again")


@cli.command()
@click.option("--quick", is_flag=True, help="Check signatures only; do not decode every chunk.")
@common
def verify(quick: bool, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Check every stored byte. Exit status 5 when anything is damaged."""
    from dormouse import catalogue
    from dormouse.store.store import Store

    with Store.open(data_dir.create().store) as store, reporter:
        report = store.verify(deep=not quick, progress=reporter.amount("verify"))
        hit = catalogue.models_with_damaged_weights(store, report)
    if as_json:
        emit(
            {
                "ok": report.ok,
                "chunks": report.chunks,
                "damages": [str(damage) for damage in report.damages],
                "weights_hit": hit,
                "notes": report.notes,
            }
        )
    else:
        for damage in report.damages:
            out.print(f"[red]damaged[/] {escape(str(damage))}")
        for name in hit:
            out.print(f"[red]damaged[/] the weights of model {escape(name)}: import it again with --replace")
        for note in report.notes:
            out.print(f"note: {escape(note)}")
        out.print(f"{report.chunks} chunks checked, {len(report.damages)} damaged")
    if not report.ok:
        sys.exit(5)


@cli.group()
def key() -> None:
    """The key that signs this host's snapshots: who has it can make snapshots that this host trusts."""


@key.command("show")
@common
def key_show(data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Show the key's id, never the key."""
    from dormouse.store.key_import import host_key

    key_id = host_key(data_dir.key, data_dir.store).id.hex()
    emit({"key_id": key_id}) if as_json else out.print(key_id)


@key.command("export")
@click.argument("target", metavar="FILE | -", type=click.Path(path_type=Path, allow_dash=True))
@common
def key_export(target: Path, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Write the key to a new file of mode 0600, or to stdout, for a host that is to read this store's snapshots."""
    from dormouse.store.key_import import export_key, host_key

    found = host_key(data_dir.key, data_dir.store)
    if str(target) == "-":
        click.echo(found.text(), nl=False)
        return
    export_key(found, target)
    if as_json:
        emit({"key_id": found.id.hex(), "file": str(target)})
    else:
        out.print(f"Key {found.id.hex()} written to {escape(str(target))}; keep it secret")


@key.command("import")
@click.argument("source", metavar="FILE | -", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--force", is_flag=True, help="Replace another key; what it signed becomes unreadable.")
@common
def key_import(source: Path, force: bool, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Make a key, exported by another host, this host's. Stop `dormouse serve` before."""
    from dormouse.store.key import Key, parse_key, read_key
    from dormouse.store.key_import import import_key
    from dormouse.store.store import Store

    if str(source) == "-":
        taken: Key | None = parse_key(sys.stdin.buffer.read(4096), "the key on stdin")
    else:
        taken = read_key(source)
    if taken is None:
        raise NotFoundError(f"there is no file {source}", remedy="`dormouse key export FILE` makes one")
    result = import_key(taken, data_dir.create().key, data_dir.store, force=force)
    Store.open(data_dir.store).close()
    if as_json:
        emit(dataclasses.asdict(result))
    else:
        state = "is now this host's" if result.changed else "was this host's already"
        out.print(f"Key {result.key_id} {state}; {result.readable} manifests readable, {result.unreadable} not")


@cli.group()
def setup() -> None:
    """Set up what this machine lacks."""


@setup.command("criu")
@common
def setup_criu_(data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Find CRIU 4.1 or newer, or unpack one into the data folder with apt's own tools."""
    from dormouse.snapshot.criu_setup import setup_criu

    data_dir.create()
    with reporter:
        criu = setup_criu(data_dir.root, progress=reporter.step)
    if as_json:
        emit({"version": criu.version_text, "source": criu.source, "command": list(criu.argv_prefix)})
    else:
        out.print(f"CRIU {criu.version_text} ({criu.source})")


@cli.command("doctor")
@common
def doctor_(data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Tell what this machine can do, and the remedy for what it cannot. Exit status 4 when the main job can't run."""
    from dormouse import doctor

    with reporter:
        reporter.step("examining this machine")
        checks = doctor.examine(data_dir.root)
    emit(doctor.as_json(checks)) if as_json else out.print(doctor.render(checks))
    if not doctor.main_job_possible(checks):
        sys.exit(4)


@cli.group()
def bench() -> None:
    """Measure."""


@bench.command("start")
@click.argument("model")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1, 1000), help="Starts of each kind.")
@click.option("--prompt", default="What is the capital of France?", show_default=True, help="The user's message.")
@common
def bench_start(model: str, runs: int, prompt: str, data_dir: DataDir, as_json: bool, reporter: Reporter) -> None:
    """Time cold starts, restores (page cache dropped, or warm) and wakes of a process that stayed."""
    import asyncio

    from dormouse import bench_start as bench_module

    with reporter:
        result = asyncio.run(bench_module.measure(data_dir, model, runs=runs, prompt=prompt, step=reporter.step))
    emit(bench_module.as_json(result)) if as_json else out.print(bench_module.render(result))


@bench.command("load")
@click.option("--gigabytes", type=click.FloatRange(0.001), help="How much to make.  [default: 16 with a GPU, else 1]")
@click.option("--shards", default=4, show_default=True, type=click.IntRange(1, 256), help="In how many files.")
@click.option("--files", type=click.Path(path_type=Path, exists=True), help="A folder of .safetensors instead.")
@click.option("--folder", default=".", type=click.Path(path_type=Path), help="Where, on the disk to be measured.")
@click.option("--device", help="cpu, cuda:0, ...  [default: cuda:0 if there is one, else cpu]")
@click.option("--method", "names", multiple=True, help="Only this one; may be given more than once.")
@click.option("--cold/--no-cold", default=True, help="Whether to load from the disk, too.")
@click.option("--repeats", default=1, show_default=True, type=click.IntRange(1, 100), help="The fastest counts.")
@click.option("--lora", is_flag=True, help="An adapter of 1 GB into a running model, too.")
@click.option("--codec", is_flag=True, help="The codec alone, too.")
@click.option("--budget-seconds", type=click.FloatRange(1.0), help="Skip what no longer fits into that time.")
@click.option("--output", type=click.Path(path_type=Path), help="A JSON file, written anew after every row.")
@common
def bench_load(data_dir: DataDir, as_json: bool, reporter: Reporter, **options: Any) -> None:
    """Time how weights come from files into memory or onto a GPU: by the loaders that are installed, and by ours."""
    from dormouse.bench_load.course import measure
    from dormouse.bench_load.options import Hooks, options_of
    from dormouse.bench_load.result import table

    del data_dir  # files and checkpoints are made in a folder of their own
    with reporter:
        result = measure(options_of(**options), Hooks(reporter.step, tell(reporter.silent)))
    emit(result.as_json()) if as_json else out.print(table(result))


@cli.command()
@click.argument("scenario", metavar="SCENARIO.yaml", type=click.Path(path_type=Path))
@click.option("--traces", type=click.Path(path_type=Path), help="Folder of trace files.  [default: the scenario's]")
@click.option("--system", "systems", multiple=True, help="Only this one; may be given more than once.")
@click.option("--case", "cases", multiple=True, help="Only this one; may be given more than once.")
@click.option("--seed", type=click.IntRange(0), help="Instead of the scenario's.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the result as CSV.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it, too: a .png, .svg or .html file.")
@common
def simulate(
    scenario: Path, traces: Path | None, systems: tuple[str, ...], cases: tuple[str, ...], seed: int | None,
    as_csv: bool, plot: Path | None, data_dir: DataDir, as_json: bool, reporter: Reporter,
) -> None:  # fmt: skip
    """Simulate a cluster and its requests under several policies, and compare what requests would meet."""
    from dormouse.sim import plots, report
    from dormouse.sim.run import simulate as run_scenario
    from dormouse.sim.scenario import load_scenario

    del data_dir  # nothing of it is needed
    loaded = load_scenario(scenario)
    if seed is not None:
        loaded = loaded.model_copy(update={"seed": seed})
    if plot is not None:
        plots.check(plot)
    outcomes, rows, tenants = [], [], []
    with reporter:
        runs = run_scenario(
            loaded, traces=traces or scenario.parent, systems=systems, cases=cases, say=reporter.step,
            spans=plot is not None,
        )  # fmt: skip
        for outcome in runs:
            rows.append(report.row_of(outcome, loaded.slo))
            tenants += report.tenant_rows(outcome, loaded.slo)
            if plot is not None:
                outcomes.append(outcome)
    if plot is not None:
        plots.draw(outcomes, plot, loaded.name)
    if as_json:
        emit(report.as_json(loaded, rows, tenants))
    elif as_csv:
        click.echo(report.as_csv(rows, tenants), nl=False)
    else:
        wide = Console(width=max(out.width, 150))  # a table that is read later in a file is not cut
        wide.print(report.table(rows, loaded.slo))
        if tenants:
            wide.print(report.table(tenants, loaded.slo, "start-up latency by tenant"))
        wide.print(report.cost_table(rows))
        if compared := report.compare(loaded, rows):
            wide.print(report.comparison_table(compared))
        if distances := report.distances(loaded, rows):
            wide.print(report.distance_table(distances))


def _open_standard_streams() -> None:
    """A closed one would be the number of the first file that is opened, which then would be taken for a stream."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def main() -> None:
    """Entry point: runs a verb and turns every error into one clear sentence and an exit status."""
    started = time.monotonic()
    keep_freed_memory()
    _open_standard_streams()
    try:
        cli.main(standalone_mode=False, prog_name="dormouse")
    except click.ClickException as error:
        if _wants_json():
            _emit_error("usage", error.format_message(), "See `dormouse --help`")
        else:
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        err.print("interrupted")
        sys.exit(130)
    except DormouseError as error:
        _show(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has gone
        sys.exit(0)
    except Exception as error:
        if os.environ.get("DORMOUSE_DEBUG"):
            raise
        after = f"(after {time.monotonic() - started:.1f} s)"
        remedy = f"This is a bug in dormouse; run again with DORMOUSE_DEBUG=1 for the details {after}"
        _show_words("internal_error", f"unexpected {type(error).__name__}: {error}", remedy)
        sys.exit(INTERNAL_ERROR)


def _wants_json() -> bool:
    """Whether the command line asks for JSON, however much else is wrong with it."""
    options = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return "--json" in options


def _emit_error(code: str, message: str, remedy: str) -> None:
    emit({"error": {"code": code, "message": message, "remedy": remedy}})


def _show(error: DormouseError) -> None:
    _show_words(error.code, error.message, error.remedy)


def _show_words(code: str, message: str, remedy: str) -> None:
    if _wants_json():
        _emit_error(code, message, remedy)
        return
    err.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if remedy:
        err.print(f"[cyan]hint:[/] {escape(remedy)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
