"""The stages that run once each; generate, score and filter stream and are in ``pipeline_stream``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from craft_fast import checkpoint
from craft_fast.cache import CachedSet, LatentsError, build_cache, load_cache
from craft_fast.errors import CraftError, QualityGateError, UsageError
from craft_fast.filtering import training_samples
from craft_fast.pipeline_facts import exported_files, lora_facts, pending_files, score_facts
from craft_fast.pipeline_keys import OutputKeys, expander_cache, output_keys
from craft_fast.pipeline_own import own_weights
from craft_fast.pipeline_stream import STREAMED, Stream, Work
from craft_fast.records import FileRef, StageRow
from craft_fast.store.digest import sha256_file
from craft_fast.workbench import Meter

T = TypeVar("T")
_HASHED_BYTES = 1 << 30


class Stages:
    """Runs single stages, skips what is done, and knows the keys.

    Args:
        work: see ``Work``.
        names: all stages in order, for their numbers on screen.
    """

    def __init__(self, work: Work, names: Sequence[str]) -> None:
        self.work = work
        self.names = names
        self._adapter: dict[str, Any] | None = None
        self._keys: dict[str, str] = {name: getattr(work.keys, name) for name in ("expand", *STREAMED)}
        if self.filter_done():
            self._outputs()
        self._save_keys()

    # ---- keys and states

    def _outputs(self) -> OutputKeys:
        selection = str(self._row("filter").info["selection"])
        keys = output_keys(self.work.settings, self.work.keys, selection)
        self._keys |= vars(keys)
        return keys

    def _save_keys(self) -> None:
        text = json.dumps(self._keys, sort_keys=True)
        if self.work.run.manifest.get_meta("keys") != text:
            self.work.run.manifest.set_meta("keys", text)

    def key(self, name: str) -> str:
        """The current key of a stage; those after the filter are known once it is done."""
        if name not in self._keys:
            self._outputs()
            self._save_keys()
        return self._keys[name]

    def _row(self, name: str) -> StageRow:
        row = self.work.run.manifest.stage(name)
        return row if row is not None else StageRow(name, "", "running")

    def done(self, name: str) -> bool:
        """Whether a stage is done under the current settings and inputs, and its files are still there."""
        row = self._row(name)
        if row.state != "done" or row.key != self.key(name):
            return False
        named = [row.info[part] for part in ("path", "html", "json", "merged") if part in row.info]
        files = [self.work.run.path(str(name)) for name in named]
        if name == "evaluate":
            manifest = self.work.run.manifest
            pictures = [ref for kind in ("eval_base", "eval_tuned") for ref in manifest.files(kind, row.key).values()]
            files += [self.work.run.path(ref.path) for ref in pictures]
        return all(file.exists() for file in files) and self._undamaged(row)

    def _undamaged(self, row: StageRow) -> bool:
        """Whether the exported files are what was written; one of many GiB is left to ``verify``."""
        if "sha256" not in row.info:
            return True
        known = {(ref.path, ref.sha256) for ref in (*exported_files(row), *pending_files(row))}
        for ref in exported_files(row):
            path = self.work.run.path(ref.path)
            if not path.exists() or (ref.size <= _HASHED_BYTES and (ref.path, sha256_file(path)) not in known):
                return False
        return True

    def filter_done(self) -> bool:
        """Whether there are verdicts to train on."""
        row = self._row("filter")
        decided = self.work.run.manifest.get_meta(f"decision:{self.work.keys.filter}")
        # Verdicts over whatever candidates there were are not the end: a run may make more.
        complete = decided is not None and json.loads(decided)["reason"] != "candidates"
        return self.done("filter") and complete and int(row.info["accepted"]) > 0

    def need(self, name: str) -> None:
        """Refuse to go on without an earlier stage.

        Raises:
            UsageError: it is not done under the current settings; says what to type.
        """
        row = self._row(name)
        if row.state == "done" and row.key == self.key(name):
            return
        why = "it was done under other settings or inputs" if row.state == "done" else "it is not done"
        verb = "run --until filter" if name in STREAMED else name
        raise UsageError(
            f"This needs the stage {name} first",
            where=str(self.work.run.root),
            why=why,
            hint=f"craft-fast {verb} --name {self.work.run.root.name}",
        )

    def announce(self, name: str, note: str = "") -> None:
        """Tell that a stage begins."""
        self.work.progress.stage(name, self.names.index(name) + 1, len(self.names), note)

    def say_done(self, name: str) -> None:
        """Tell that a stage costs nothing."""
        self.announce(name, "done already")

    def _once(self, name: str, do: Callable[[], Mapping[str, Any]]) -> None:
        if self.done(name):
            self.say_done(name)
            return
        manifest, key = self.work.run.manifest, self.key(name)
        self.announce(name)
        row = manifest.begin_stage(name, key)
        meter = Meter(row.seconds, row.peak_gib)
        try:
            with meter.running():
                info = do()
        except BaseException:
            with contextlib.suppress(CraftError):
                manifest.put_stage(replace(row, seconds=meter.seconds, peak_gib=meter.peak_gib))
            raise
        manifest.finish_stage(name, key, meter.seconds, meter.peak_gib, info)
        self.work.run.log("stage", name=name, key=key[:16], seconds=round(meter.seconds, 3))

    # ---- the stages

    def expand(self) -> None:
        """Read the prompts and give each its variants."""
        self._once("expand", self._expand)

    def _expand(self) -> dict[str, Any]:
        if self.work.settings.images.folder is not None:
            from craft_fast.pipeline_own import expand_own

            return expand_own(self.work)
        from craft_fast.expanders import build_groups, make_expander
        from craft_fast.prompts import load_prompts

        work, settings = self.work, self.work.settings
        sets = load_prompts(settings.prompts)
        for note in sets.notes:
            work.progress.warn(note)
        expander = make_expander(
            settings.expand,
            cache_dir=expander_cache(work.run),
            device=settings.model.device,
            offline=settings.model.offline,
        )
        prompts = [*sets.train, *sets.heldout]
        result = build_groups(prompts, expander, settings.expand.variants, settings.seed, work.progress)
        work.run.manifest.put_groups(self.key("expand"), result.groups)
        train = sum(group.prompt.split == "train" for group in result.groups)
        return {"train": train, "heldout": len(result.groups) - train, "dropped": len(result.dropped)}

    def cache(self) -> None:
        """Weigh the accepted samples and encode their text."""
        self._once("cache", self._cache)

    def _cache(self) -> dict[str, Any]:
        work, key = self.work, self.key("cache")
        manifest = work.run.manifest
        selections, candidates = manifest.selections(work.keys.filter), manifest.candidates(work.keys.generate)
        given = own_weights(work, candidates)
        samples = training_samples(selections, candidates, work.settings.filter, work.settings.train, given)
        encoded = self._with_sound_latents(
            lambda: build_cache(
                work.run,
                work.bench.model(),
                samples,
                manifest.candidates(work.keys.generate),
                key=work.keys.text,
                progress=work.progress,
            )
        )
        manifest.put_samples(key, samples)
        return {"samples": len(samples), "encoded": encoded}

    def _with_sound_latents(self, read: Callable[[], T]) -> T:
        """Read latents; candidates whose files are damaged are made again, with the same bits, and read once more."""
        try:
            return read()
        except LatentsError as error:
            self.work.progress.warn(f"{error.what} {error.why}; {len(error.prompt_ids)} groups are made again")
            self.work.run.log("candidates_rebuilt", groups=len(error.prompt_ids))
            Stream(self.work, ()).remake(error.prompt_ids)
            return read()

    def train(self) -> None:
        """Train the adapter on the accepted samples."""
        self._once("train", self._train)

    def _train(self) -> dict[str, Any]:
        from craft_fast.budget import training_budget
        from craft_fast.evaluate import SampleDrawer
        from craft_fast.train import train

        work, settings = self.work, self.work.settings
        cached = self._cached_set()
        work.bench.drop_rewards()
        heldout = [group.prompt for group in work.run.manifest.groups(work.keys.expand, "heldout")]
        model, given = work.bench.model(), work.bench.concessions()
        shown = heldout[: settings.train.sample_prompts] if settings.train.sample_every else []
        result = train(
            work.run,
            model,
            cached,
            settings=settings.train,
            seed=settings.seed,
            key=self.key("train"),
            progress=work.progress,
            should_stop=work.should_stop,
            samples=SampleDrawer(work.run, model, shown, settings, given, work.progress),
            memory_bytes=training_budget(settings, model.device),
        )
        # The trained UNet goes before another part comes.
        model.rest()
        work.bench.collect()
        if not result.finished:
            work.check_stop()
        self._adapter = result.adapter
        losses = [loss for loss in result.losses if loss is not None]
        return {
            "steps": result.step,
            "samples": len(cached),
            "final_loss": losses[-1] if losses else None,
            "skipped": result.step - len(losses),
            "micro_batch_size": result.micro_batch_size,
        }

    def _cached_set(self) -> CachedSet:
        work, manifest = self.work, self.work.run.manifest
        samples = manifest.samples(self.key("cache"))
        return self._with_sound_latents(
            lambda: load_cache(
                work.run,
                work.bench.model,
                samples,
                manifest.candidates(work.keys.generate),
                key=work.keys.text,
                progress=work.progress,
            )
        )

    def export(self) -> None:
        """Write the LoRA file."""
        self._once("export", self._export)

    def _export(self) -> dict[str, Any]:
        from craft_fast.export import export_lora

        work = self.work
        if self._adapter is None:
            found = checkpoint.latest(work.run, self.key("train"), progress=work.progress)
            if found is None or found.step < work.settings.train.steps:
                work.progress.warn("The trained weights are not there any more; training continues where it can")
                self._train()
            else:
                self._adapter = found.adapter
        assert self._adapter is not None
        facts = lora_facts(work, train_key=self.key("train"), cache_key=self.key("cache"))
        # A file that is written again after the evaluation has its scores in at once.
        if work.settings.train.method != "full":
            facts |= score_facts(work.run.manifest.eval_rows(self.key("evaluate")))
        return export_lora(
            work.run, self._adapter, settings=work.settings, metadata=facts, progress=work.progress
        ).info()

    def evaluate(self) -> None:
        """Compare base and tuned model on held-out prompts."""
        self._once("evaluate", self._evaluate)

    def _evaluate(self) -> dict[str, Any]:
        from craft_fast.evaluate import evaluate

        work, settings = self.work, self.work.settings
        rows = evaluate(
            work.run,
            work.bench.model(),
            self._result_path(),
            [group.prompt for group in work.run.manifest.groups(work.keys.expand, "heldout")],
            work.bench.rewards(held_out=True, progress=work.progress),
            settings=settings.evaluate,
            generate_settings=settings.generate,
            seed=settings.seed,
            key=self.key("evaluate"),
            progress=work.progress,
            should_stop=work.should_stop,
            concessions=work.bench.concessions(),
        )
        self._stamp(score_facts(rows))
        return {"metrics": len(rows), "prompts": rows[0].n if rows else 0}

    def _stamp(self, facts: Mapping[str, Any]) -> None:
        """Put the scores into the LoRA's header; while the new file takes the old one's place, the row names both."""
        from craft_fast.export import stamp

        if self.work.settings.train.method == "full":
            return  # many GiB would be written again for some lines of text
        row, put = self._row("export"), self.work.run.manifest.put_stage
        info = {key: value for key, value in row.info.items() if key != "next"}
        files = exported_files(row)
        loras = [ref for ref in files if ref.path != row.info.get("merged")]

        def announce(new: Sequence[FileRef]) -> None:
            put(replace(row, info={**info, "next": [asdict(ref) for ref in new]}))

        new = stamp(self.work.run, loras, facts, pending=pending_files(row), announce=announce)
        by_path = {ref.path: asdict(ref) for ref in new}
        also = [by_path.get(ref.path, asdict(ref)) for ref in files[1:]]
        put(replace(row, info={**info, **by_path[files[0].path], **({"also": also} if also else {})}))

    def _result_path(self) -> Path:
        path = self.work.run.path(str(self._row("export").info["path"]))
        return path.parent if self.work.settings.train.method == "full" else path

    def report(self) -> None:
        """Write the page and the JSON."""
        self._once("report", self._report)

    def _report(self) -> dict[str, Any]:
        from craft_fast.report import build_report

        page, figures = build_report(self.work.run, self.work.settings)
        root = self.work.run.root
        return {"html": page.relative_to(root).as_posix(), "json": figures.relative_to(root).as_posix()}

    def quality_gate(self) -> None:
        """Hold the evaluation against ``evaluate.min_win_rate``.

        Raises:
            QualityGateError: a held-out reward's win rate is lower.
        """
        least = self.work.settings.evaluate.min_win_rate
        if least is None:
            return
        rows = self.work.run.manifest.eval_rows(self.key("evaluate"))
        low = [f"{row.metric} {row.win_rate:.1%}" for row in rows if row.held_out and row.win_rate < least]
        if low:
            raise QualityGateError(
                "The run finished, but the result is not as good as asked for",
                where="evaluate.min_win_rate",
                why=f"win rate at least {least:.1%} wanted; found {', '.join(low)}",
                hint="more samples (filter.target_samples), more steps (train.steps), or filter.select=top",
            )
