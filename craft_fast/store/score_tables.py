"""Scores in the manifest: of candidates, of evaluation pictures, of any picture (judgements), and how they came about.

A score's provenance is kept once and referred to; None is that of scores which version 1 of the manifest recorded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from craft_fast.records import Provenance, ScoreRow
from craft_fast.store.database import Database, upsert
from craft_fast.store.digest import digest_json, sha256_bytes

EvalScore = tuple[str, str, str, float]
"""side (``base`` or ``tuned``), prompt_id, reward, value."""

Judged = tuple[str, str]
"""What a judgement is about: sha256 of the picture's file, and the text."""


class ScoreTables(Database):
    """The part of a manifest that holds scores."""

    # ---- provenances

    def _keep_provenances(self, found: Iterable[Provenance | None]) -> None:
        """Rows that others are about to refer to; inside their transaction."""
        rows = [(_id(item), json.dumps(asdict(item), sort_keys=True)) for item in set(found) if item is not None]
        self._many("INSERT OR IGNORE INTO provenances VALUES (?, ?)", sorted(rows))

    def _provenances(self) -> dict[str | None, Provenance | None]:
        found: dict[str | None, Provenance | None] = {None: None}
        for name, text in self._all("SELECT id, json FROM provenances"):
            found[name] = Provenance(**json.loads(text))
        return found

    # ---- candidates

    def put_scores(self, rows: Sequence[ScoreRow]) -> None:
        """Keep reward values, with how they came about."""
        with self.transaction():
            self._keep_provenances(row.provenance for row in rows)
            self._many(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)",
                [(row.candidate_id, row.reward, row.reward_key, row.value, _id(row.provenance)) for row in rows],
            )

    def scores(
        self,
        reward_keys: Mapping[str, str],
        candidate_ids: Iterable[str] | None = None,
        *,
        provenances: Mapping[str, Provenance | None] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Values by candidate and reward.

        Args:
            reward_keys: reward name to the key under which it scored.
            candidate_ids: only these; None: all.
            provenances: by reward name, only scores that came about in this way; rewards that are not named: any.

        Returns:
            candidate_id to {reward name: value}; a candidate without any score is absent.
        """
        result: dict[str, dict[str, float]] = {}
        for candidate_id, name, value, found in self._score_rows(reward_keys, candidate_ids):
            if provenances is None or name not in provenances or found == _id(provenances[name]):
                result.setdefault(candidate_id, {})[name] = value
        return result

    def scored_by(
        self, reward_keys: Mapping[str, str], candidate_ids: Iterable[str] | None = None
    ) -> dict[str, dict[str, Provenance | None]]:
        """How the values that ``scores`` gives came about: candidate_id to {reward name: provenance}."""
        known = self._provenances()
        result: dict[str, dict[str, Provenance | None]] = {}
        for candidate_id, name, _, found in self._score_rows(reward_keys, candidate_ids):
            result.setdefault(candidate_id, {})[name] = known[found]
        return result

    def provenances(
        self, reward_keys: Mapping[str, str], candidate_ids: Iterable[str] | None = None
    ) -> dict[str, dict[Provenance | None, int]]:
        """How the scores of each reward came about, with how many did so; rewards without scores are absent."""
        known = self._provenances()
        result: dict[str, dict[Provenance | None, int]] = {}
        for _, name, _, found in self._score_rows(reward_keys, candidate_ids):
            counts = result.setdefault(name, {})
            counts[known[found]] = counts.get(known[found], 0) + 1
        return result

    def drop_scores(self, reward: str, reward_key: str, candidate_ids: Iterable[str]) -> None:
        """Forget scores that are not to be used any more; the judgements they were made of stay."""
        sql = "DELETE FROM scores WHERE candidate_id = ? AND reward = ? AND reward_key = ?"
        self._many(sql, [(candidate_id, reward, reward_key) for candidate_id in candidate_ids])

    def _score_rows(
        self, reward_keys: Mapping[str, str], candidate_ids: Iterable[str] | None
    ) -> list[tuple[str, str, float, str | None]]:
        """candidate_id, reward name, value and id of the provenance."""
        wanted = None if candidate_ids is None else set(candidate_ids)
        sql = "SELECT candidate_id, value, provenance FROM scores WHERE reward = ? AND reward_key = ?"
        return [
            (candidate_id, name, value, found)
            for name, key in reward_keys.items()
            for candidate_id, value, found in self._all(sql, name, key)
            if wanted is None or candidate_id in wanted
        ]

    # ---- pictures

    def put_judgements(self, reward_key: str, provenance: Provenance, values: Mapping[Judged, float]) -> None:
        """Keep what a reward said of pictures and texts.

        Args:
            reward_key: the reward's own key.
            provenance: how the values came about.
            values: by picture and text.
        """
        with self.transaction():
            self._keep_provenances([provenance])
            self._many(
                "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?, ?)",
                [
                    (image, _text_id(text), reward_key, _id(provenance), value)
                    for (image, text), value in values.items()
                ],
            )

    def judgements(
        self, reward_key: str, provenance: Provenance | None, wanted: Collection[Judged]
    ) -> dict[Judged, float]:
        """What a reward has said of these pictures and texts before, in this way; what it was never asked is absent.

        Args:
            reward_key: the reward's own key.
            provenance: how the values came about; None: in any way, for counting.
            wanted: pictures and texts.
        """
        sql = "SELECT value FROM judgements WHERE image_sha256 = ? AND prompt_sha256 = ? AND reward_key = ?"
        more: tuple[Any, ...] = ()
        if provenance is not None:
            sql, more = sql + " AND provenance = ?", (_id(provenance),)
        found: dict[Judged, float] = {}
        for image, text in wanted:
            if rows := self._all(sql, image, _text_id(text), reward_key, *more):
                found[image, text] = rows[0][0]
        return found

    # ---- evaluation

    def put_eval_scores(
        self, key: str, rows: Sequence[EvalScore], provenances: Mapping[str, Provenance | None] | None = None
    ) -> None:
        """Keep scores of evaluation images: (side, prompt_id, reward, value); ``provenances`` is by reward name."""
        ways = provenances or {}
        with self.transaction():
            self._keep_provenances(ways.values())
            values = [(key, *row, _id(ways.get(row[2]))) for row in rows]
            self._many(upsert("eval_scores", "key side prompt_id reward", "value provenance"), values)

    def eval_scores(self, key: str) -> list[EvalScore]:
        """Scores of evaluation images under ``key``, in the order in which they were put."""
        sql = "SELECT side, prompt_id, reward, value FROM eval_scores WHERE key = ? ORDER BY ord"
        return [(row[0], row[1], row[2], row[3]) for row in self._all(sql, key)]

    def eval_provenances(self, key: str) -> dict[str, dict[Provenance | None, int]]:
        """How the scores of evaluation images came about, by reward name, with how many did so."""
        known = self._provenances()
        sql = "SELECT reward, provenance, count(*) FROM eval_scores WHERE key = ? GROUP BY 1, 2 ORDER BY min(ord)"
        result: dict[str, dict[Provenance | None, int]] = {}
        for reward, found, count in self._all(sql, key):
            result.setdefault(reward, {})[known[found]] = count
        return result


def _id(provenance: Provenance | None) -> str | None:
    return None if provenance is None else digest_json(asdict(provenance))[:16]


def _text_id(text: str) -> str:
    # A lone surrogate, which no UTF-8 can hold, must not stop a run here.
    return sha256_bytes(text.encode("utf-8", "surrogatepass"))
