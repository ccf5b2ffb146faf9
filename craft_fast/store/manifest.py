"""The run's manifest: one SQLite file in which every finished piece of work has its row.

Files are written first (``store.atomic``), rows after, so a row never names a file that is not there. Every ``put_*``
is idempotent and one transaction. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from craft_fast.records import Candidate, EvalRow, FileRef, Group, Prompt, Sample, Selection, Split, StageRow, Variant
from craft_fast.store.database import upsert
from craft_fast.store.score_tables import EvalScore, ScoreTables


class Manifest(ScoreTables):
    """Typed access to a run's rows; scores are in ``ScoreTables``, opening and transactions in ``Database``."""

    # ---- meta and stages

    def get_meta(self, k: str) -> str | None:
        """The text under ``k``, or None."""
        rows = self._all("SELECT v FROM meta WHERE k = ?", k)
        return str(rows[0][0]) if rows else None

    def set_meta(self, k: str, v: str) -> None:
        """Keep the text ``v`` under ``k``."""
        self._many(upsert("meta", "k", "v"), [(k, v)])

    def stage(self, name: str) -> StageRow | None:
        """State of one stage, or None when it never began."""
        return next((row for row in self.stages() if row.name == name), None)

    def stages(self) -> list[StageRow]:
        """All stages that ever began, in the order in which they first did."""
        rows = self._all("SELECT name, key, state, seconds, peak_gib, info FROM stages ORDER BY ord")
        return [StageRow(name, key, state, s, peak, json.loads(info)) for name, key, state, s, peak, info in rows]

    def begin_stage(self, name: str, key: str) -> StageRow:
        """Mark a stage as running; one that was interrupted under the same ``key`` keeps its seconds and info."""
        before = self.stage(name)
        if before is not None and before.state == "running" and before.key == key:
            return before
        row = StageRow(name, key, "running")
        self.put_stage(row)
        return row

    def finish_stage(
        self, name: str, key: str, seconds: float, peak_gib: float | None, info: Mapping[str, Any] | None = None
    ) -> None:
        """Mark a stage as done."""
        self.put_stage(StageRow(name, key, "done", seconds, peak_gib, info or {}))

    def put_stage(self, row: StageRow) -> None:
        """Write a stage's row as it is."""
        values = (row.name, row.key, row.state, row.seconds, row.peak_gib, _json(row.info))
        self._many(upsert("stages", "name", "key state seconds peak_gib info"), [values])

    # ---- prompts and candidates

    def put_groups(self, key: str, groups: Iterable[Group]) -> None:
        """Keep groups (prompts with their variants) under the expansion ``key``."""
        rows = []
        for group in groups:
            prompt, variants = group.prompt, [[variant.member, variant.text] for variant in group.variants]
            texts = (prompt.text, prompt.line, _json(prompt.meta), json.dumps(variants, ensure_ascii=False))
            rows.append((key, prompt.split, prompt.prompt_id, *texts))
        self._many(upsert("prompts", "key split prompt_id", "text line meta variants"), rows)

    def groups(self, key: str, split: Split = "train") -> list[Group]:
        """Groups under ``key``, in the order in which they were put."""
        if split not in get_args(Split):
            raise ValueError(f"split {split!r}")
        sql = "SELECT prompt_id, text, line, meta, variants FROM prompts WHERE key = ? AND split = ? ORDER BY ord"
        return [
            Group(
                Prompt(prompt_id, text, split, line, json.loads(meta)),
                tuple(Variant(prompt_id, member, variant) for member, variant in json.loads(variants)),
            )
            for prompt_id, text, line, meta, variants in self._all(sql, key, split)
        ]

    def put_candidates(self, key: str, rows: Sequence[Candidate]) -> None:
        """Keep candidates whose files are already written."""
        with self.transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO candidate_groups (key, prompt_id) VALUES (?, ?)",
                [(key, row.prompt_id) for row in rows],
            )
            marks = ", ".join("?" * 13)
            values = []
            for row in rows:
                text = (row.candidate_id, row.base_prompt, row.prompt, row.noise_seed)
                values.append((key, row.prompt_id, row.member, *text, *_ref(row.latents), *_ref(row.image)))
            self._db.executemany(f"INSERT OR REPLACE INTO candidates VALUES ({marks})", values)

    def candidates(self, key: str) -> list[Candidate]:
        """Candidates under ``key`` by group (in the order of first insertion) and member."""
        sql = (
            "SELECT c.candidate_id, c.prompt_id, c.member, c.base_prompt, c.prompt, c.noise_seed, latents_path,"
            " latents_sha256, latents_size, image_path, image_sha256, image_size"
            " FROM candidates c JOIN candidate_groups g ON g.key = c.key AND g.prompt_id = c.prompt_id"
            " WHERE c.key = ? ORDER BY g.ord, c.member"
        )
        return [_candidate(row) for row in self._all(sql, key)]

    def drop_candidates(self, key: str, prompt_ids: Iterable[str]) -> None:
        """Forget the candidates of some groups, so that they are made again in their old place."""
        self._many("DELETE FROM candidates WHERE key = ? AND prompt_id = ?", [(key, item) for item in prompt_ids])

    # ---- verdicts and samples

    def put_selections(self, key: str, rows: Sequence[Selection]) -> None:
        """Keep the filter's verdicts."""
        values = []
        for row in rows:
            verdict = (row.prompt_id, row.member, row.accepted, _json(row.passed), row.r_total, row.advantage)
            values.append((key, row.candidate_id, *verdict))
        columns = "prompt_id member accepted passed r_total advantage"
        self._many(upsert("selections", "key candidate_id", columns), values)

    def selections(self, key: str) -> list[Selection]:
        """Verdicts under ``key``, in the order in which they were put."""
        sql = (
            "SELECT candidate_id, prompt_id, member, accepted, passed, r_total, advantage FROM selections"
            " WHERE key = ? ORDER BY ord"
        )
        return [
            Selection(candidate_id, prompt_id, member, bool(accepted), json.loads(passed), r_total, advantage)
            for candidate_id, prompt_id, member, accepted, passed, r_total, advantage in self._all(sql, key)
        ]

    def put_samples(self, key: str, rows: Sequence[Sample]) -> None:
        """Keep training samples."""
        values = [(key, row.sample_id, row.candidate_id, row.prompt, row.weight) for row in rows]
        self._many(upsert("samples", "key sample_id", "candidate_id prompt weight"), values)

    def samples(self, key: str) -> list[Sample]:
        """Training samples under ``key``, in the order in which they were put."""
        sql = "SELECT sample_id, candidate_id, prompt, weight FROM samples WHERE key = ? ORDER BY ord"
        return [Sample(*row) for row in self._all(sql, key)]

    # ---- files and evaluation

    def put_files(self, kind: str, key: str, files: Mapping[str, FileRef]) -> None:
        """Keep records of files (cache entries, evaluation images, checkpoints, ...) that are already written."""
        values = [(kind, key, name, *_ref(ref)) for name, ref in files.items()]
        self._many(upsert("files", "kind key id", "path sha256 size"), values)

    def files(self, kind: str, key: str) -> dict[str, FileRef]:
        """Id to file record."""
        sql = "SELECT id, path, sha256, size FROM files WHERE kind = ? AND key = ? ORDER BY ord"
        return {row[0]: FileRef(*row[1:]) for row in self._all(sql, kind, key)}

    def drop_files(self, kind: str, key: str, ids: Iterable[str]) -> None:
        """Forget files that are being removed or rebuilt."""
        self._many("DELETE FROM files WHERE kind = ? AND key = ? AND id = ?", [(kind, key, item) for item in ids])

    def all_files(self) -> list[tuple[str, str, str, FileRef]]:
        """Every file that a row names: (kind, key, id, record); candidates have kinds ``latents`` and ``image``."""
        rows = [
            (*row[:3], FileRef(*row[3:])) for row in self._all("SELECT kind, key, id, path, sha256, size FROM files")
        ]
        for kind in ("latents", "image"):
            sql = f"SELECT key, candidate_id, {kind}_path, {kind}_sha256, {kind}_size FROM candidates"
            rows += [(kind, row[0], row[1], FileRef(*row[2:])) for row in self._all(sql)]
        return rows

    def put_eval(self, key: str, rows: Sequence[EvalRow]) -> None:
        """Keep the evaluation's table."""
        values = [
            (key, row.metric, row.held_out, row.base_mean, row.tuned_mean, row.win_rate, row.ci_low, row.ci_high, row.n)
            for row in rows
        ]
        columns = "held_out base_mean tuned_mean win_rate ci_low ci_high n"
        self._many(upsert("eval_rows", "key metric", columns), values)

    def eval_rows(self, key: str) -> list[EvalRow]:
        """The evaluation's table under ``key``."""
        sql = (
            "SELECT metric, held_out, base_mean, tuned_mean, win_rate, ci_low, ci_high, n FROM eval_rows"
            " WHERE key = ? ORDER BY ord"
        )
        return [EvalRow(row[0], bool(row[1]), *row[2:]) for row in self._all(sql, key)]


def _json(value: Any) -> str:
    return json.dumps(dict(value), sort_keys=True, ensure_ascii=False)


def _candidate(row: tuple[Any, ...]) -> Candidate:
    candidate_id, prompt_id, member, base_prompt, prompt, noise_seed, *files = row
    latents, image = FileRef(*files[:3]), FileRef(*files[3:])
    return Candidate(candidate_id, prompt_id, member, base_prompt, prompt, noise_seed, latents, image)


def _ref(ref: FileRef) -> tuple[str, str, int]:
    return (ref.path, ref.sha256, ref.size)


__all__ = ["EvalScore", "Manifest"]
