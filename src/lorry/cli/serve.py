"""``lorry serve``: a base with many adapters behind OpenAI's HTTP interface."""

from __future__ import annotations

import gc
import inspect
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import BaseArgument, Dtype, Json, adapter_references, key_values
from lorry.cli.declared import Declared, declared_options
from lorry.cli.output import err, note, progress, size, table
from lorry.cli.sampling import Template
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.serving.engine import Engine
    from lorry.serving.http.keys import Keys
    from lorry.serving.http.server import DrainingServer
    from lorry.serving.http.state import Serving
    from lorry.serving.modes.mode import Mode

#: A key that is given so stands in no list of processes.
KEY_VARIABLE = "LORRY_API_KEY"
_KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "Path": Path}
#: Names of loopback, which a server without keys answers to.
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Serve on replicas under Ray Serve: local starts Ray here, auto finds it, or where."
    ),
]


def _signature(
    base: BaseArgument,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR", help="Adapter to serve from the start; repeatable."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", metavar="[NAME=]DIR", help="Retriever to embed and rank with; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; any but loopback needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the base; its folder's name.")] = None,
    adapter_dir: Annotated[
        list[Path] | None,
        typer.Option("--adapter-dir", help="Folder below which clients may load adapters; repeatable."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="YAML file of keys with their adapters, limits and rates.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar=KEY_VARIABLE, show_envvar=True, help="The one key, which may do everything."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Let clients of the tinker interface train adapters on the base.")
    ] = False,
    train_dir: Annotated[
        Path, typer.Option("--train-dir", help="Folder of what they train; a server that starts on it goes on.")
    ] = Path("lorry-training"),
    train_tokens: Annotated[
        int, typer.Option("--train-tokens", min=1, help="Tokens of a joint pass of training, at most.")
    ] = 8192,
    template: Template = None,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1; auto takes a GPU.")] = "auto",
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request, at most.")] = 4 << 20,
    max_requests: Annotated[int, typer.Option(min=1, help="Sequences under way, waiting ones too, at most.")] = 4096,
    max_sessions: Annotated[int, typer.Option(min=0, help="Sessions of roles that are kept at once; 0 for none.")] = 64,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds for what still runs when the server is told to end.")
    ] = 60.0,
    bench: Annotated[
        bool, typer.Option("--bench", help="Listen nowhere: replay a workload on the engine and print what users see.")
    ] = False,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            metavar="KEY=VALUE",
            help="Of --bench: rate, seconds, cv, alpha, longest_input, ...; repeatable.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Of --bench: also draw it, to this PNG file.")] = None,
    as_json: Json = False,
    ray: RayAddress = None,
) -> None:
    """Declare the flags that are neither options of the engine nor of the replicas."""


def serve(**flags: Any) -> None:
    """Serve a base, its adapters and compositions of them over HTTP, as OpenAI's clients expect it.

    A request's model is the base, an adapter, or a composition: base+math:0.7+story:0.3. /docs lists the endpoints. The
    first SIGTERM or Ctrl-C lets what runs end and refuses what is new; the second ends at once.

    With --bench it serves nobody: requests come as --workload says (gamma arrivals, a power law over the adapters,
    random prompts), and throughput, times and hit rates are printed. With --bench the base may be the URL of a running
    server, which is asked with --api-key; -a names adapters that it serves, without any all that it lists.
    """
    own = {name: flags.pop(name) for name in _OWN}
    options = {name: _value(name, value) for name, value in flags.items() if value is not None}
    cluster = {name: options.pop(name) for name in _CLUSTER if name in options}
    if own["ray"] is not None:
        serve_replicas(own, options, cluster)
        return
    if cluster:
        flag = next(iter(cluster)).replace("_", "-")
        raise OptionError(f"--{flag} is for replicas under Ray Serve; give --ray local, too.")
    if own["bench"]:
        _bench(own, options)
        return
    for flag in ("workload", "plot", "as_json"):
        if own[flag]:
            raise OptionError(f"--{flag.removeprefix('as_')} belongs to --bench; give that, too, or leave it out.")
    server = build(own, options)
    try:
        with _out_of_the_collector():
            server.run()
    finally:
        if server.trainer is not None:
            server.trainer.close()
        server.service.close()
        server.service.engine.close()


def _bench(own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Replay a workload on what would be served."""
    from lorry.cli.serve_bench import bench_engine, bench_server, workload_of

    if own["base"].startswith(("http://", "https://")):
        for flag in sorted(options):
            raise OptionError(f"--{flag.replace('_', '-')} is the server's; leave it out where a URL is asked.")
        given = key_values(own["workload"], "--workload")
        bench_server(own["base"], own["api_key"], list(own["adapter"] or ()), given, own["plot"], own["as_json"])
        return
    references = adapter_references(own["adapter"])
    workload = workload_of(key_values(own["workload"], "--workload"), len(references))
    engine, _ = _engine(own, options)
    try:
        _load(engine, references, own["name"] or _name(own["base"]))
        with _out_of_the_collector():
            bench_engine(engine, list(references), workload, own["max_requests"], own["plot"], own["as_json"])
    finally:
        engine.close()


@contextmanager
def _out_of_the_collector() -> Iterator[None]:
    """Let the garbage collector pass over what was loaded: looking at it again and again would hold up requests."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _value(name: str, value: Any) -> Any:
    """Return an engine's option; one that is written ``{name: value, ...}`` is a mapping."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise OptionError(f"--{name.replace('_', '-')}: cannot read {value!r} as YAML.") from None


def serve_replicas(own: Mapping[str, Any], engine_options: Mapping[str, Any], cluster: Mapping[str, Any]) -> None:
    """Serve on replicas until this program is told to end."""
    from lorry.serving.cluster.deploy import take_down

    for flag in ("bench", "train", "mode"):
        if own[flag]:
            raise OptionError(f"--{flag} is for a server of one process; leave out --ray.")
    ended = Event()
    before: dict[signal.Signals, Any] = {}
    try:
        address = start_replicas(own, engine_options, cluster)
        for number in (signal.SIGTERM, signal.SIGINT):  # now, since Ray sets handlers of its own when it starts
            before[number] = signal.signal(number, lambda *_: ended.set())
        note(f"serving {own['name'] or _name(own['base'])} at {address}")
        ended.wait()
    finally:
        take_down()
        for number, handler in before.items():
            signal.signal(number, handler)


def start_replicas(own: Mapping[str, Any], engine_options: Mapping[str, Any], cluster: Mapping[str, Any]) -> str:
    """Start the replicas that the flags mean, and return where they are served."""
    from lorry.serving.cluster.deploy import connect, deploy
    from lorry.serving.cluster.options import ClusterOptions
    from lorry.serving.options import EngineOptions

    options = ClusterOptions(**cluster)
    EngineOptions(**engine_options)  # what is wrong shall be said here, and not in the log of a replica
    keys, template, references = _checked(own)
    name = own["name"] or _name(own["base"])
    for adapter, (path, weight) in references.items():
        _check_adapter(adapter, path, weight, name)
    adapters = {adapter: path.absolute() for adapter, (path, _) in references.items()}
    connect(own["ray"])
    base = Path(own["base"]).expanduser()
    there = {  # the replicas' processes may stand in another folder
        "base": str(base.absolute()) if base.is_dir() else own["base"],
        "adapter_dir": [folder.absolute() for folder in own["adapter_dir"] or ()],
        "keys": None if own["keys"] is None else own["keys"].absolute(),
    }
    make = partial(_serving, {**own, **there, "name": name}, dict(engine_options), template)
    return deploy(
        make,
        name,
        adapters,
        options,
        host=own["host"],
        port=own["port"],
        patience=own["patience"],
        most_bytes=own["max_body"],
        hosts=_hosts(own, keys),
    )


def _checked(own: Mapping[str, Any]) -> tuple[Keys, str | None, Mapping[str, tuple[Path, float]]]:
    """Return the keys, the template and the adapters that the flags name, before anything is loaded."""
    from lorry.serving.http.server import check_exposed

    keys = _keys(own["keys"], own["api_key"])
    check_exposed(own["host"], keys.required)
    template = own["template"]
    if template is not None:
        from lorry.cli.sampling import template_of

        template = template_of(None, template)
    for folder in own["adapter_dir"] or ():
        if not folder.is_dir():
            raise OptionError(f"--adapter-dir: there is no folder {folder}.")
    return keys, template, adapter_references(own["adapter"])


def build(own: Mapping[str, Any], engine_options: Mapping[str, Any]) -> DrainingServer:
    """Return the server that the flags mean, with everything loaded; `engine_options` are the engine's."""
    keys, template, references = _checked(own)
    serving = _serving(own, engine_options, template)
    _load(serving.engine, references, serving.base)
    serving.modes.update(_modes(serving.engine, own["mode"], {*references, "base", serving.base}))
    _show(serving.engine, serving.base)
    return _server(serving, _hosts(own, keys), own)


def _keys(file: Path | None, secret: str | None) -> Keys:
    from lorry.serving.http.keys import Keys

    if file is not None and secret is not None:
        raise OptionError(f"Give either --keys or --api-key (or {KEY_VARIABLE}).")
    if file is not None:
        return Keys.read(file)
    return Keys() if secret is None else Keys.single(secret)


def _engine(own: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Engine, Any]:
    import torch

    from lorry.cli.bases import load_base, load_tokenizer
    from lorry.serving.engine import Engine
    from lorry.serving.options import EngineOptions
    from lorry.serving.scheduling.policy import policy_from

    checked = EngineOptions(**options)
    policy_from(checked.policy)  # refused before anything is loaded
    tokenizer = load_tokenizer(own["base"])
    note(f"loading {own['base']} ...")
    model = load_base(own["base"], own["dtype"])
    place = own["device"]
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {place}: {str(error).splitlines()[0]}.") from error
    return Engine(model, tokenizer, checked), tokenizer


def _name(base: str) -> str:
    from lorry.cli.bases import said_name

    return said_name(base) or Path(os.path.realpath(Path(base).expanduser())).name


def _load(engine: Engine, references: Mapping[str, tuple[Path, float]], base: str) -> None:
    """Load the adapters of the command line."""
    with progress() as shown:
        task = shown.add_task("adapters", total=len(references), visible=bool(references))
        for name, (path, weight) in references.items():
            _check_adapter(name, path, weight, base)
            receipt = engine.load(name, path)
            if len(references) <= 32:
                note(str(receipt))
            shown.advance(task)


def _check_adapter(name: str, path: Path, weight: float, base: str) -> None:
    """Raise `OptionError` for an adapter that cannot be served under its name."""
    if name in ("base", base):
        raise OptionError(f"'{name}' names the base; call the adapter otherwise: --adapter NAME={path}.")
    if weight != 1:
        raise OptionError(f"--adapter {name}: a weight belongs to a request, as in model {name}:{weight:g}.")


def _modes(engine: Engine, texts: Sequence[str] | None, taken: Collection[str]) -> dict[str, Mode]:
    """Load the retrievers of the command line."""
    from lorry.serving.retrieval import serve_mode

    found = {}
    for name, (path, _) in adapter_references(texts).items():
        if name in taken:
            raise OptionError(f"'{name}' is taken; call the mode otherwise: --mode NAME={path}.")
        found[name] = serve_mode(engine, name, path)
    return found


def _show(engine: Engine, base: str) -> None:
    """Print what is served."""
    adapters = engine.adapters()
    rows = [(base, "base", "", "")]
    rows += [(each.name, each.place, str(each.rank), size(each.bytes)) for each in adapters[:32]]
    err().print(table("", ("model", "place", "rank", "size"), rows, right=("rank", "size")))
    if len(adapters) > 32:
        note(f"and {len(adapters) - 32} more")


def _serving(own: Mapping[str, Any], engine_options: Mapping[str, Any], template: str | None) -> Serving:
    """Return an engine, without adapters, with what belongs to it."""
    from lorry.serving.agents.sessions import SessionLimits, Sessions
    from lorry.serving.http.prompts import Prompts
    from lorry.serving.http.state import Serving
    from lorry.serving.service import Service

    engine, tokenizer = _engine(own, engine_options)
    service = Service(engine, max_requests=own["max_requests"])
    keys = _keys(own["keys"], own["api_key"])
    name = own["name"] or _name(own["base"])
    serving = Serving.over(service, Prompts(tokenizer, template), keys, name, tuple(own["adapter_dir"] or ()))
    serving.sessions = Sessions(engine, SessionLimits(sessions=own["max_sessions"]))
    return serving


def _hosts(own: Mapping[str, Any], keys: Keys) -> frozenset[str] | None:
    """Return the names that the server answers to: one of a single user without keys is not for other sites' pages."""
    return None if keys.required else _LOOPBACK | {own["host"]}


def _server(serving: Serving, hosts: Collection[str] | None, own: Mapping[str, Any]) -> DrainingServer:
    """Return the HTTP server over what is served, with training if it was asked for."""
    from lorry.serving.http.app import create_app
    from lorry.serving.http.server import DrainingServer

    service, trainer = serving.service, None
    if own["train"]:
        from lorry.serving.training.options import TrainingOptions
        from lorry.serving.training.trainer import Trainer

        trainer = Trainer(service, TrainingOptions(folder=own["train_dir"], max_tokens=own["train_tokens"]))
        note(f"training is on; {own['train_dir']} keeps what clients train")
    source = Path(own["base"]).expanduser()
    name = _tokenizer_name(serving.engine.tokenizer, own["base"])
    app = create_app(
        serving,
        most_bytes=own["max_body"],
        hosts=hosts,
        training=trainer,
        tokenizer=os.path.realpath(source) if source.is_dir() else name,
    )
    said: Callable[[str], None] = lambda address: note(f"serving {serving.base} at {address}")  # noqa: E731
    return DrainingServer(app, own["host"], own["port"], service, patience=own["patience"], ready=said, trainer=trainer)


def _tokenizer_name(tokenizer: Any, base: str) -> str:
    """Return where clients find the tokenizer: where it was read from."""
    name = getattr(tokenizer, "name_or_path", "")
    return name if isinstance(name, str) and name else base


def _flag(field: Declared) -> inspect.Parameter:
    """Return an option of the engine as a flag; None where it was not given."""
    kind = _KINDS.get(field.type.split("|")[0].strip(), str)
    long = f"--{field.name.replace('_', '-')}"
    declared = f"{long}/--no-{long[2:]}" if kind is bool else long
    text = f"{field.help} Default: {field.default}."
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(declared, help=text, show_default=False)],
    )


_given = list(inspect.signature(_signature, eval_str=True).parameters.values())
_OWN = tuple(parameter.name for parameter in _given)
_replicas = declared_options("serving/cluster/options.py", "ClusterOptions")
_CLUSTER = tuple(field.name for field in _replicas)
serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _given]
    + [_flag(field) for field in (*_replicas, *declared_options("serving/options.py", "EngineOptions"))]
)
serve.__annotations__ = {p.name: p.annotation for p in serve.__signature__.parameters.values()}  # type: ignore[attr-defined]
