"""Tables of the run's manifest. A change here raises ``SCHEMA_VERSION`` and adds a step to ``MIGRATIONS``."""

SCHEMA_VERSION = 2

# How a score came about (records.Provenance as JSON). The id is the digest of it, so it is the same in every run,
# whatever was scored first; NULL in a row that refers to it: not known, made by version 1.
_PROVENANCES = "CREATE TABLE IF NOT EXISTS provenances (id TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID"
# Judgements belong to a picture and a text, not to a candidate: the same picture is never judged twice.
_JUDGEMENTS = """CREATE TABLE IF NOT EXISTS judgements (
  image_sha256 TEXT NOT NULL, prompt_sha256 TEXT NOT NULL, reward_key TEXT NOT NULL, provenance TEXT NOT NULL,
  value REAL NOT NULL, PRIMARY KEY (image_sha256, prompt_sha256, reward_key, provenance)) WITHOUT ROWID"""

# ``ord`` is the order of first insertion: an upsert keeps it, so work that is redone keeps its place.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta (k TEXT PRIMARY KEY, v TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS stages (
  ord INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, key TEXT NOT NULL, state TEXT NOT NULL,
  seconds REAL NOT NULL, peak_gib REAL, info TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS prompts (
  ord INTEGER PRIMARY KEY, key TEXT NOT NULL, split TEXT NOT NULL, prompt_id TEXT NOT NULL, text TEXT NOT NULL,
  line INTEGER NOT NULL, meta TEXT NOT NULL, variants TEXT NOT NULL, UNIQUE (key, split, prompt_id));
CREATE TABLE IF NOT EXISTS candidate_groups (
  ord INTEGER PRIMARY KEY, key TEXT NOT NULL, prompt_id TEXT NOT NULL, UNIQUE (key, prompt_id));
CREATE TABLE IF NOT EXISTS candidates (
  key TEXT NOT NULL, prompt_id TEXT NOT NULL, member INTEGER NOT NULL, candidate_id TEXT NOT NULL,
  base_prompt TEXT NOT NULL, prompt TEXT NOT NULL, noise_seed INTEGER NOT NULL,
  latents_path TEXT NOT NULL, latents_sha256 TEXT NOT NULL, latents_size INTEGER NOT NULL,
  image_path TEXT NOT NULL, image_sha256 TEXT NOT NULL, image_size INTEGER NOT NULL,
  PRIMARY KEY (key, prompt_id, member), UNIQUE (key, candidate_id));
CREATE TABLE IF NOT EXISTS scores (
  candidate_id TEXT NOT NULL, reward TEXT NOT NULL, reward_key TEXT NOT NULL, value REAL NOT NULL, provenance TEXT,
  PRIMARY KEY (candidate_id, reward, reward_key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS selections (
  ord INTEGER PRIMARY KEY, key TEXT NOT NULL, candidate_id TEXT NOT NULL, prompt_id TEXT NOT NULL,
  member INTEGER NOT NULL, accepted INTEGER NOT NULL, passed TEXT NOT NULL, r_total REAL NOT NULL,
  advantage REAL NOT NULL, UNIQUE (key, candidate_id));
CREATE TABLE IF NOT EXISTS samples (
  ord INTEGER PRIMARY KEY, key TEXT NOT NULL, sample_id TEXT NOT NULL, candidate_id TEXT NOT NULL,
  prompt TEXT NOT NULL, weight REAL NOT NULL, UNIQUE (key, sample_id));
CREATE TABLE IF NOT EXISTS files (
  ord INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL,
  path TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL, UNIQUE (kind, key, id));
CREATE TABLE IF NOT EXISTS eval_rows (
  ord INTEGER PRIMARY KEY, key TEXT NOT NULL, metric TEXT NOT NULL, held_out INTEGER NOT NULL,
  base_mean REAL NOT NULL, tuned_mean REAL NOT NULL, win_rate REAL NOT NULL, ci_low REAL NOT NULL,
  ci_high REAL NOT NULL, n INTEGER NOT NULL, UNIQUE (key, metric));
CREATE TABLE IF NOT EXISTS eval_scores (
  ord INTEGER PRIMARY KEY, key TEXT NOT NULL, side TEXT NOT NULL, prompt_id TEXT NOT NULL, reward TEXT NOT NULL,
  value REAL NOT NULL, provenance TEXT, UNIQUE (key, side, prompt_id, reward));
{_PROVENANCES};
{_JUDGEMENTS};
"""

# From each earlier version to the one after it.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE scores ADD COLUMN provenance TEXT",
        "ALTER TABLE eval_scores ADD COLUMN provenance TEXT",
        _PROVENANCES,
        _JUDGEMENTS,
    ),
}

# What makes a file of an earlier version readable as it is: temporary tables and views, which live outside the file
# and come first when a name is looked up.
READ_AS_CURRENT: dict[int, tuple[str, ...]] = {
    1: (
        "PRAGMA temp_store = MEMORY",
        _PROVENANCES.replace("CREATE TABLE", "CREATE TEMP TABLE"),
        _JUDGEMENTS.replace("CREATE TABLE", "CREATE TEMP TABLE"),
        "CREATE TEMP VIEW scores AS SELECT candidate_id, reward, reward_key, value, NULL AS provenance"
        " FROM main.scores",
        "CREATE TEMP VIEW eval_scores AS SELECT ord, key, side, prompt_id, reward, value, NULL AS provenance"
        " FROM main.eval_scores",
    ),
}
