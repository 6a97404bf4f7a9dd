-- The job store, version 1. Times are seconds since the epoch (wall clock).

CREATE TABLE jobs (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    job_id           TEXT    NOT NULL UNIQUE,
    content_digest   TEXT    NOT NULL,
    pipeline_digest  TEXT    NOT NULL,
    target           TEXT    NOT NULL,                   -- '' where nothing is pushed
    pipeline         TEXT    NOT NULL,
    source_path      TEXT    NOT NULL,
    spec             TEXT    NOT NULL,                   -- JobSpec as JSON
    state            TEXT    NOT NULL,
    attempt          INTEGER NOT NULL,
    failures         INTEGER NOT NULL,
    reason           TEXT,
    failure          TEXT,                               -- Failure as JSON
    outcome          TEXT,                               -- Outcome as JSON
    worker           TEXT,
    lease_until      REAL,
    next_try_at      REAL,
    cancel_requested INTEGER NOT NULL,
    created_at       REAL    NOT NULL,
    updated_at       REAL    NOT NULL,
    UNIQUE (content_digest, pipeline_digest, target),
    CHECK ((state = 'running') = (worker IS NOT NULL AND lease_until IS NOT NULL)),
    CHECK ((state IN ('retrying', 'waiting')) = (next_try_at IS NOT NULL))
) STRICT;

CREATE INDEX jobs_by_state ON jobs (state, seq);
CREATE INDEX jobs_by_target ON jobs (target, seq);

-- Every transition of every job, for `ckptd jobs info`.
CREATE TABLE history (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id  TEXT    NOT NULL REFERENCES jobs (job_id) ON DELETE CASCADE,
    at      REAL    NOT NULL,
    state   TEXT    NOT NULL,
    attempt INTEGER NOT NULL,
    reason  TEXT
) STRICT;

CREATE INDEX history_by_job ON history (job_id, seq);

-- What was last seen of every watched checkpoint, whether or not a job came of it: a restart
-- does not hash again what is known, and a checkpoint that was refused can say why.
CREATE TABLE sightings (
    source_path    TEXT NOT NULL,
    pipeline       TEXT NOT NULL,
    fingerprint_id TEXT NOT NULL,
    verdict        TEXT NOT NULL,
    reason         TEXT,
    job_id         TEXT,
    at             REAL NOT NULL,
    PRIMARY KEY (source_path, pipeline)
) STRICT, WITHOUT ROWID;
