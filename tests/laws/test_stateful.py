"""The life of adapters on one model in any order, against dense weights in float64.

Hypothesis draws the steps: attach, load, activate, rows, merge, switch, train, configure, save, detach, copy. After
every one of them the model must give what `laws.dense` makes of a copy of the base that never met Lorry.
``LORRY_HYPOTHESIS=thorough`` draws many more, and others each time.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from core.tiny import llama, off_zero, same_bytes, tokens
from hypothesis import assume, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from laws.dense import Dense, Twin, loss_of
from laws.drawing import THOROUGH, effort, options_of, refused, without_tasks

import lorry
from lorry.core.life.switch import Switch, make_switch

#: Rules of promises that the core does not keep yet; each becomes True with the change that keeps it.
THREADS = True
SWITCHED_IS_MERGED = True
NORMS_ARE_TAKEN_AWAY = True

NAMES = ("a", "b", "c", "d")
TARGETS = ("attention", "mlp", "all-linear", ["q_proj", "down_proj"], ["embed_tokens", "v_proj"], ["layers.1.*"])
BLOCKS = (["model.norm"], ["layers.0.mlp"])
WEIGHTS = (1.0, 0.5, -1.0, 2.0, 0.25)
MOST = 3
IDS = tokens(3, 5)
slugs = st.sampled_from(sorted(lorry.methods()))
#: Options that may be changed on an adapter that exists.
CHANGES: dict[str, list[dict[str, Any]]] = {
    "lora": [{"alpha": 3.0}, {"rank_stabilized": True}, {"alpha": None}],
    "dora": [{"alpha": 0.5}],
    "matryoshka-lora": [{"at": 1}, {"at": None}, {"cut_scale": "rank"}],
    "smora": [{"alpha": 3.0}, {"bias_in_gate": False}],
    "flylora": [{"select": "magnitude"}, {"select": "all"}, {"alpha": 5.0}],
    "lora-mixer": [{"inference_mode": "soft"}, {"renormalize_topk": True}],
    "mixlora": [{"routing": "top_p"}, {"activation": "relu"}, {"top_k": 1}],
    "remix": [{"rank_stabilized": True}],
    "vera": [{"dropout": 0.0}],
    "hira": [{"alpha": 0.5}],
}
_BASES: list[Any] = []


def base() -> Any:
    """A tiny Llama in float64, one of whose parameters does not train."""
    if not _BASES:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
        _BASES.append(llama(2, **sizes).double())
        _BASES[0].model.norm.weight.requires_grad_(False)
    return copy.deepcopy(_BASES[0])


class Life(RuleBasedStateMachine):
    """One model, what is known of its adapters, and the dense model that it must equal."""

    def __init__(self) -> None:
        super().__init__()
        self.model = base()
        self.dense = Dense(self.model)
        self.before = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.trains = {n: p.requires_grad for n, p in self.model.named_parameters()}
        self.classes = {n: type(m) for n, m in self.model.named_modules()}
        self.attributes = {n: set(m.__dict__) for n, m in self.model.named_modules()}
        self.twins: dict[str, Twin] = {}
        self.active: dict[str, float] = {}
        self.switch: Switch | None = None
        self.saved: dict[str, Twin] = {}
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        for name in [t.name for t, _ in reversed(self.dense.inside)]:
            if name == self.switched:
                self.switch.off()
            else:
                lorry.adapters(self.model)[name].unfuse()
        for adapter in lorry.adapters(self.model).values():
            adapter.detach()
        self.twins, self.active, self.dense.inside, self.switch = {}, {}, [], None
        self.dense.refresh()
        self.nothing_is_left_after_the_last_adapter()
        self.the_base_is_what_it_was()
        self.folder.cleanup()

    # what is known

    @property
    def inside(self) -> list[str]:
        return [twin.name for twin, _ in self.dense.inside]

    @property
    def switched(self) -> str | None:
        return None if self.switch is None else self.switch.adapter.name

    def adapter(self, name: str) -> lorry.Adapter:
        return lorry.adapters(self.model)[name]

    def drawn(self, data: Any, names: list[str] | None = None) -> str:
        return data.draw(st.sampled_from(sorted(self.twins) if names is None else names), "name")

    def conflict(self, composition: dict[str, float]) -> bool:
        """Whether two adapters would replace the same block."""
        taken: set[str] = set()
        for name in [n for n, w in composition.items() if w]:
            if taken & self.twins[name].blocks:
                return True
            taken |= self.twins[name].blocks
        return False

    def composition(self, data: Any, most: int = 2) -> dict[str, float]:
        names = st.lists(st.sampled_from(sorted(self.twins)), unique=True, max_size=most)
        found = {n: data.draw(st.sampled_from(WEIGHTS), "weight") for n in data.draw(names, "composition")}
        return {} if self.conflict(found) else found

    def close(self, found: torch.Tensor, wanted: torch.Tensor, what: Any) -> None:
        tolerance = 1e-9 if all(t.exact for t in self.twins.values()) else 1e-5
        size = max(1.0, float(wanted.abs().max()))
        gap = float((found.double() - wanted).abs().max()) / size
        assert gap < tolerance, f"{what}: {gap:.2e} away from the dense model of {self.twins_in_words()}"

    def twins_in_words(self) -> str:
        listed = [f"{n}: {t.method} on {t.targets}" for n, t in self.twins.items()]
        return f"{listed}, active {self.active}, inside {self.inside}"

    # rules

    @initialize(data=st.data(), sparse=st.booleans())
    def first(self, data: Any, sparse: bool) -> None:
        self.attach_one(data, st.just("shira") if sparse else slugs)

    @precondition(lambda self: len(self.twins) < MOST)
    @rule(data=st.data())
    def attach(self, data: Any) -> None:
        self.attach_one(data, slugs)

    def attach_one(self, data: Any, slugs: st.SearchStrategy[str]) -> None:
        name = data.draw(st.sampled_from([n for n in NAMES if n not in self.twins]), "name")
        options = data.draw(slugs.flatmap(options_of), "method")
        options = without_tasks(options)
        assume(not refused(options))
        if options["method"] == "uni-lora":
            options.pop("size", None)
        kinds = lorry.methods()[options["method"]].kinds
        targets = data.draw(st.sampled_from(BLOCKS if options["method"] == "full" else TARGETS), "targets")
        activate, seed = data.draw(st.booleans(), "activate"), data.draw(st.integers(0, 99), "seed")
        try:
            adapter = lorry.attach(
                self.model, options, targets=targets, name=name, seed=seed, dtype=torch.float64, activate=activate
            )
        except lorry.LorryError as refusal:
            note(f"refused for {kinds}: {refusal}")
            return
        off_zero(adapter, seed, 0.1)
        self.twins[name] = Twin(adapter, targets)
        self.active = {name: 1.0} if activate else self.active

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def attach_a_name_that_is_taken(self, data: Any) -> None:
        with pytest.raises(lorry.AdapterError, match="attached already"):
            lorry.attach(self.model, "lora", name=self.drawn(data))

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), plain=st.booleans())
    def activate(self, data: Any, plain: bool) -> None:
        wanted = {self.drawn(data): 1.0} if plain else self.composition(data)
        if self.switched in wanted:
            with contextlib.suppress(lorry.AdapterError):  # refused, or not counted twice
                lorry.activate(self.model, wanted)
                self.active = wanted
            return
        if any(n in self.inside and w != 1.0 for n, w in wanted.items()):
            with pytest.raises(lorry.AdapterError):
                lorry.activate(self.model, wanted)
            return
        lorry.activate(self.model, next(iter(wanted)) if plain else wanted or None)
        self.active = wanted

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def rows(self, data: Any) -> None:
        rows = [self.composition(data) for _ in range(len(IDS))]
        if self.inside:
            with pytest.raises(lorry.AdapterError), lorry.rows(self.model, rows):
                self.model(IDS)
            return
        given = [next(iter(r)) if list(r.values()) == [1.0] else (r or None) for r in rows]
        wanted = self.dense.rows(IDS, rows, self.twins)
        with torch.no_grad(), lorry.rows(self.model, given):
            first, again = self.model(IDS).logits, self.model(IDS).logits
        self.close(first, wanted, f"rows {given}")
        self.close(again, wanted, f"rows {given}, a second time")

    @precondition(lambda self: self.twins and not self.inside and THREADS)
    @rule(data=st.data())
    def rows_in_two_threads(self, data: Any) -> None:
        both = [[self.composition(data) for _ in range(len(IDS))] for _ in range(2)]
        wanted = [self.dense.rows(IDS, rows, self.twins) for rows in both]
        barrier, found = threading.Barrier(2, timeout=60), {}

        def job(number: int) -> None:
            for _ in range(3):
                with torch.no_grad(), lorry.rows(self.model, [r or None for r in both[number]]):
                    barrier.wait()
                    found[number] = self.model(IDS).logits
                    barrier.wait()

        other = threading.Thread(target=job, args=(1,))
        other.start()
        job(0)
        other.join()
        for number, logits in found.items():
            self.close(logits, wanted[number], f"thread {number} with rows {both[number]}")

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def merge(self, data: Any) -> None:
        name = self.drawn(data)
        twin = self.twins[name]
        elsewise = self.active.get(name, 1.0) != 1.0  # it is active with another weight than it would be merged with
        if self.switch is not None:
            with contextlib.suppress(lorry.AdapterError):  # refused, or right
                self.adapter(name).fuse()
                self.adapter(name).unfuse()
            return
        if name in self.inside or not twin.merges or elsewise:
            with pytest.raises(lorry.AdapterError):
                self.adapter(name).fuse()
            return
        assert self.adapter(name).fuse().sites == len(twin.methods)
        assert self.adapter(name).fused
        self.dense.inside.append((twin, 1.0))
        self.dense.refresh()

    @precondition(lambda self: self.inside and self.switch is None)
    @rule(data=st.data())
    def unfuse(self, data: Any) -> None:
        name = self.drawn(data, self.inside)
        if self.has_others_above(name):
            with pytest.raises(lorry.AdapterError, match="fused after"):
                self.adapter(name).unfuse()
            return
        self.adapter(name).unfuse()
        assert not self.adapter(name).fused
        self.forget_inside(name)

    def has_others_above(self, name: str) -> bool:
        """Whether another adapter was merged into the same weights later."""
        later = self.dense.inside[self.inside.index(name) + 1 :] if name in self.inside else []
        return any(self.twins[name].methods.keys() & twin.methods.keys() for twin, _ in later)

    def forget_inside(self, name: str) -> None:
        self.dense.inside = [pair for pair in self.dense.inside if pair[0].name != name]
        self.dense.refresh()

    @precondition(lambda self: not self.inside)
    @rule(data=st.data(), weight=st.sampled_from(WEIGHTS))
    def switch_on(self, data: Any, weight: float) -> None:
        sparse = sorted(n for n, t in self.twins.items() if t.method.info.slug == "shira")
        if not sparse:
            return
        name = self.drawn(data, sparse)
        switch = make_switch(self.adapter(name), weight)
        if self.active.get(name):
            with pytest.raises(lorry.AdapterError):
                switch.on()
            lorry.activate(self.model, None)
            self.active = {}
        switch.on()
        self.switch = switch
        self.dense.inside.append((self.twins[name], weight))
        self.dense.refresh()
        if not SWITCHED_IS_MERGED:
            self.the_model_equals_the_dense_one()
            self.switch_off()

    @precondition(lambda self: self.switch is not None)
    @rule()
    def switch_off(self) -> None:
        self.switch.off()
        self.forget_inside(self.switch.adapter.name)
        with pytest.raises(lorry.AdapterError):
            self.switch.off()
        self.switch = None

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), mode=st.booleans())
    def freeze_or_train(self, data: Any, mode: bool) -> None:
        name = self.drawn(data)
        if name == self.switched:
            return
        if mode and name in self.inside:
            with pytest.raises(lorry.AdapterError, match="fused"):
                self.adapter(name).train()
            return
        self.adapter(name).train(mode)
        assert bool(self.adapter(name).parameters()) == mode

    @precondition(lambda self: set(self.twins) - set(self.inside))
    @rule(data=st.data(), steps=st.integers(1, 2))
    def train_a_step(self, data: Any, steps: int) -> None:
        name = self.drawn(data, sorted(set(self.twins) - set(self.inside)))
        adapter, rate = self.adapter(name).train(), 0.05
        lorry.activate(self.model, name)
        self.active = {name: 1.0}
        for _ in range(steps):
            wanted = self.dense.trained(IDS, name, self.twins, rate)
            optimizer = torch.optim.SGD(adapter.parameters(), rate)
            loss_of(self.model(IDS).logits).backward()
            optimizer.step()
            for parameter in self.model.parameters():
                parameter.grad = None
            twin = self.twins[name]
            for key, tensor, _ in adapter.named_tensors():
                atol = 1e-9 if twin.exact else 1e-6
                torch.testing.assert_close(
                    tensor.detach(), wanted[key], atol=atol, rtol=atol, msg=f"{twin.method}: {key}"
                )
                twin.tensors[key] = tensor.detach().clone()

    @precondition(lambda self: self.twins and not self.inside)
    @rule(data=st.data())
    def gradients_of_rows(self, data: Any) -> None:
        """Every adapter in training gets the sum of what its rows give alone."""
        rows = [self.composition(data) for _ in range(len(IDS))]
        trained = [n for n in self.twins if self.adapter(n).trainable and any(n in r for r in rows)]
        assume(trained)
        results = []
        for together in (True, False):
            with contextlib.ExitStack() as stack:
                if together:
                    stack.enter_context(lorry.rows(self.model, [r or None for r in rows]))
                    self.model(IDS).logits.square().sum().backward()
                for number, row in enumerate([] if together else rows):
                    lorry.activate(self.model, row or None)
                    alone = self.model(IDS[number : number + 1]).logits.square().sum()
                    if alone.requires_grad:
                        alone.backward()
            results.append({(n, k): p.grad for n in trained for k, p in self.adapter(n).named_parameters()})
            for parameter in self.model.parameters():
                parameter.grad = None
        lorry.activate(self.model, self.active or None)
        for key, gradient in results[1].items():
            found = results[0][key]
            assert (found is None or not found.any()) if gradient is None else found is not None, key
            if gradient is not None:
                torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-5)

    @precondition(lambda self: set(self.twins) - set(self.inside))
    @rule(data=st.data())
    def configure(self, data: Any) -> None:
        able = sorted(n for n in set(self.twins) - set(self.inside) if self.twins[n].method.info.slug in CHANGES)
        assume(able)
        name = self.drawn(data, able)
        changes = data.draw(st.sampled_from(CHANGES[self.twins[name].method.info.slug]), "options")
        try:
            self.adapter(name).configure(**changes)
        except lorry.LorryError as refusal:
            note(f"refused: {refusal}")
            return
        twin = Twin(self.adapter(name), self.twins[name].targets)
        assert all(same_bytes(t, self.twins[name].tensors[n]) for n, t in twin.tensors.items())
        assert all(getattr(twin.method, option) == value for option, value in changes.items())
        self.twins[name] = twin

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def save(self, data: Any) -> None:
        name = self.drawn(data)
        folder = f"{len(self.saved)}-{name}"
        self.adapter(name).save(Path(self.folder.name) / folder)
        self.saved[folder] = copy.copy(self.twins[name])
        self.saved[folder].tensors = dict(self.twins[name].tensors)

    @precondition(lambda self: self.saved and len(self.twins) < MOST and self.switch is None)
    @rule(data=st.data(), trainable=st.booleans(), activate=st.booleans())
    def load(self, data: Any, trainable: bool, activate: bool) -> None:
        folder = data.draw(st.sampled_from(sorted(self.saved)), "folder")
        name = data.draw(st.sampled_from([n for n in NAMES if n not in self.twins]), "name")
        adapter = lorry.load(
            self.model, Path(self.folder.name) / folder, name=name, trainable=trainable, activate=activate
        )
        twin, kept = Twin(adapter, self.saved[folder].targets), self.saved[folder]
        assert adapter.trainable == trainable and adapter.name == name
        assert twin.methods == kept.methods and twin.tensors.keys() == kept.tensors.keys()
        for key, tensor in twin.tensors.items():
            assert same_bytes(tensor, kept.tensors[key]), key
        self.twins[name] = twin
        self.active = {name: 1.0} if activate else self.active

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def detach(self, data: Any) -> None:
        name = self.drawn(data)
        if self.has_others_above(name):
            with pytest.raises(lorry.AdapterError, match="fused after"):
                self.adapter(name).detach()
            return
        gone = weakref.ref(self.adapter(name))
        homes = [weakref.ref(p) for p in self.adapter(name).parameters()]
        if name == self.switched:
            with contextlib.suppress(lorry.AdapterError):  # refused, or right
                self.adapter(name).detach()
            if name in lorry.adapters(self.model):
                return
            self.switch = None
        else:
            self.adapter(name).detach()
        self.forget_inside(name)
        del self.twins[name]
        self.active.pop(name, None)
        gc.collect()
        assert gone() is None and not any(home() is not None for home in homes), f"'{name}' is kept alive"
        self.nothing_is_left_after_the_last_adapter()

    @precondition(lambda self: self.twins and self.switch is None)
    @rule(data=st.data(), go_on_with_the_copy=st.booleans())
    def copy_the_model(self, data: Any, go_on_with_the_copy: bool) -> None:
        twin = copy.deepcopy(self.model)
        kept, changed = (twin, self.model) if go_on_with_the_copy else (self.model, twin)
        for name, adapter in lorry.adapters(changed).items():
            if not adapter.fused:
                off_zero(adapter, 5, 0.5)
                assert lorry.adapters(kept)[name] is not adapter
        lorry.activate(changed, None)
        self.model = kept

    # invariants

    @invariant()
    def the_model_equals_the_dense_one(self) -> None:
        if self.conflict(self.active):
            return
        with torch.no_grad():
            wanted = self.dense.forward(IDS, self.active, self.twins)
            self.close(self.model(IDS).logits, wanted, f"active {self.active}")

    @invariant()
    def the_base_is_what_it_was(self) -> None:
        now = self.model.state_dict()
        assert [name for name in now if name in self.before] == list(self.before)
        new = set(now) - set(self.before)  # biases that a layer without one has while an adapter of biases is in it
        assert {name.rpartition(".")[2] for name in new} <= {"bias"}
        inside = [method for twin, _ in self.dense.inside for method in twin.methods.values()]
        assert not new or any(method.info.slug == "bitfit" for method in inside)
        inside = {n for twin, _ in self.dense.inside for n in twin.deltas(self.dense.sites)}
        weights = dict(self.dense.base.named_parameters())
        for name, value in self.before.items():
            if name not in inside:
                assert same_bytes(now[name], value), name
            else:
                torch.testing.assert_close(now[name], weights[name].detach(), atol=1e-6, rtol=1e-6)

    @invariant()
    def the_adapters_are_what_is_known_of_them(self) -> None:
        assert lorry.adapters(self.model).keys() == self.twins.keys()
        for name, twin in self.twins.items():
            adapter = self.adapter(name)
            assert adapter.name == name and adapter.method == twin.method
            assert adapter.fused == (name in self.inside) or name == self.switched
            assert {n: e.method for n, e in adapter.entries.items()} == twin.methods
            tensors = {n: t.detach() for n, t, _ in adapter.named_tensors()}
            assert all(same_bytes(t, twin.tensors[n]) for n, t in tensors.items()), name

    @invariant()
    def the_base_is_frozen_while_there_are_adapters(self) -> None:
        trained = {id(p) for a in lorry.adapters(self.model).values() for p in a.parameters()}
        if self.twins:
            assert all(id(p) in trained for p in self.model.parameters() if p.requires_grad)

    def nothing_is_left_after_the_last_adapter(self) -> None:
        if lorry.adapters(self.model):
            return
        assert {n: p.requires_grad for n, p in self.model.named_parameters()} == self.trains
        for name, module in self.model.named_modules():
            assert type(module) is self.classes[name], name
            own = set(module.__dict__) - (set() if NORMS_ARE_TAKEN_AWAY else {"_lorry_norms"})
            assert own == self.attributes[name], name
            assert not any("lorry" in key for key in module._parameters), name
        assert "lorry" not in inspect.getmodule(type(self.model).forward).__name__


TestLife = Life.TestCase
TestLife.settings = effort(30, stateful_step_count=50 if THOROUGH else 20)
