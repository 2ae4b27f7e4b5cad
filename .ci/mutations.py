#!/usr/bin/env python3
"""Takes away, one at a time, what the promises rest on, and looks whether a test fails.

    .ci/mutations.py            all of them
    .ci/mutations.py NAME...    only these
    .ci/mutations.py --list     what there is
    .ci/mutations.py --check    only whether each text is still there, and each test: takes no time

Each mutant is an edit of the source: the text that is there, once, and the text that takes its place, in which MUTANT is
true if this mutant is to run. All are compiled together, in a copy below target/mutations, and one is chosen by the
environment: so there is one build, not one a mutant. First each test must pass without a mutant.

A text that is not there any more is an error: then the source has changed, and the mutant has to be written anew.
"""
import json, os, pathlib, re, subprocess, sys, time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "target/mutations"
SOURCE = WORK / "source"
# A mutant that makes a test hang is found as well.
LIMIT = 400

PARTS, CLAIMS, EVENTS = "src/store/parts.rs", "src/store/claims.rs", "src/store/events.rs"
OUTBOX, SETTLE, STEPS, DEAD = (
    f"src/store/webhooks/{name}.rs" for name in ("claims", "settle", "steps", "dead_letters"))

SEAM = '''
/// Whether this mutant is the one to run.
pub fn mutant(name: &str) -> bool {
    static MUTANT: std::sync::LazyLock<Option<String>> = std::sync::LazyLock::new(|| std::env::var("TIDEMILL_MUTANT").ok());
    MUTANT.as_deref() == Some(name)
}
'''


@dataclass
class Mutant:
    name: str
    what: str
    # (file, old text, new text)
    edits: list
    # Each as "target filter"; each must fail.
    tests: list


FENCED = "store a_lease_that_ran_out_is_claimed_again_and_its_old_owner_is_fenced"
SIMULATION = "simulation whatever_breaks"
POWER = "process power::what_was_not_synced_is_not_needed"
BETWEEN = "process power::the_object_is_there_before_its_row"
FOLDERS = "process power::new_folders_are_durable_too"

ANY_EPOCH = '''Condition::all()
            .add(segment::Column::BatchId.eq(of.batch.as_str()))
            .add(segment::Column::Idx.eq(of.index.0))
            .add(segment::Column::State.eq(LEASED))'''

MUTANTS = [
    Mutant("fence-part", "a part is committed whatever the epoch", [(PARTS,
        """            if !hold(&tx, of, epoch).await? {
                return roll_back(Commit::Fenced);
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            // A repeated call""",
        """            if !hold(&tx, of, epoch).await? && !MUTANT {
                return roll_back(Commit::Fenced);
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            // A repeated call""")], [FENCED, SIMULATION]),
    Mutant("fence-end", "a segment is ended whatever the epoch", [(PARTS,
        ".filter(fenced(of, epoch))\n                .exec(&tx)",
        ".filter(if MUTANT { super::claims::any_epoch(of) } else { fenced(of, epoch) })\n                .exec(&tx)"),
        (CLAIMS, "/// Selects the segment if it is still leased under this epoch.\n",
        "pub(super) fn any_epoch(of: &SegmentRef) -> Condition {\n    " + ANY_EPOCH + "\n}\n\n"
        "/// Selects the segment if it is still leased under this epoch.\n")], [FENCED, SIMULATION]),
    Mutant("fence-torn", "parts are taken back whatever the epoch", [(PARTS,
        """            if !hold(&tx, of, epoch).await? {
                return roll_back(Commit::Fenced);
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            if convert""",
        """            if !hold(&tx, of, epoch).await? && !MUTANT {
                return roll_back(Commit::Fenced);
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            if convert""")], [FENCED]),
    Mutant("fence-release", "a segment is given back whatever the epoch", [(CLAIMS,
        ".filter(fenced(of, epoch))\n                .exec(&tx)",
        ".filter(if MUTANT { any_epoch(of) } else { fenced(of, epoch) })\n                .exec(&tx)")],
        [FENCED, SIMULATION]),
    Mutant("fence-fail", "a batch is failed whatever the epoch", [("src/store/batches.rs",
        "        if !hold(&tx, of, epoch).await? {", "        if !hold(&tx, of, epoch).await? && !MUTANT {")],
        ["store only_a_run_with_its_lease_can_fail_its_batch", SIMULATION]),
    Mutant("lines-segment", "a segment ends with fewer or more lines than requests", [(PARTS,
        "            && i64::from(held.requests) != size(lines)",
        "            && i64::from(held.requests) != size(lines)\n            && !MUTANT")],
        ["store a_segment_ends_with_one_line_for_each_of_its_requests"]),
    Mutant("lines-batch", "a batch ends with fewer or more lines than requests", [(PARTS,
        "    if output + errors != row.total {", "    if output + errors != row.total && !MUTANT {")],
        ["store a_batch_does_not_end_without_a_line_for_each_of_its_requests"]),
    Mutant("refusal", "what the database refuses is taken for a database that is away", [("src/store/error.rs",
        "        if is_away(&error) {", "        if is_away(&error) || MUTANT {")],
        ["store a_refusal_is_final_and_leaves_nothing_behind"]),
    Mutant("part-epoch", "a part's row without its epoch", [(PARTS,
        "        epoch: Set(epoch.0),", "        epoch: Set(if MUTANT { 0 } else { epoch.0 }),")],
        ["store fencing::"]),
    Mutant("part-after-end", "a part is committed after its batch has ended", [(PARTS,
        """            if convert::status(&row.status)?.is_terminal() {
                return roll_back(Commit::Fenced);
            }
            let at = now(&tx).await?;
            insert(""",
        """            if convert::status(&row.status)?.is_terminal() && !MUTANT {
                return roll_back(Commit::Fenced);
            }
            let at = now(&tx).await?;
            insert(""")], [SIMULATION]),
    Mutant("claim-epoch", "a claim does not add to the epoch", [
        (CLAIMS, "Expr::col(segment::Column::Epoch).add(1))", "Expr::col(segment::Column::Epoch).add(i64::from(!MUTANT)))"),
        (CLAIMS, "epoch: Epoch(row.epoch + 1)", "epoch: Epoch(row.epoch + i64::from(!MUTANT))")], [FENCED, SIMULATION]),
    Mutant("renew-all", "a renewal keeps every lease of the node, also of what it does not run", [(CLAIMS,
        "            .add(keys);", "            .add(if MUTANT { Expr::val(1).eq(1) } else { keys });")],
        ["store a_lease_that_nobody_works_under_runs_out", SIMULATION]),
    Mutant("fsync", "objects are not fsynced", [("src/blobs.rs", ".with_fsync(true)", ".with_fsync(!MUTANT)")], [POWER]),
    Mutant("fsync-folder", "a new folder's name is not fsynced", [("src/blobs.rs",
        "made.filter_map(FsPath::parent)", "made.filter_map(FsPath::parent).filter(|_| !MUTANT)")], [FOLDERS]),
    Mutant("foreign", "an object that is gone with its whole store counts as missing", [("src/blobs/identity.rs",
        "            BlobError::Missing(_) => self.verify().await.err().unwrap_or(error),",
        "            BlobError::Missing(_) if !MUTANT => self.verify().await.err().unwrap_or(error),")],
        ["process identity::a_volume_that_is_unmounted"]),
    Mutant("unsupervised", "a part that dies is only logged", [("src/supervise.rs",
        "                first.get_or_insert(Died { part, why });", """                if MUTANT {
                    return false;
                }
                first.get_or_insert(Died { part, why });""")], ["process supervised::"]),
    Mutant("sqlite-sync", "SQLite does not sync each commit", [("src/store/mod.rs",
        '.pragma("synchronous", "FULL")', '.pragma("synchronous", if MUTANT { "NORMAL" } else { "FULL" })')], [POWER]),
    Mutant("row-first", "a part's row before its object", [("src/scheduler/checkpoint.rs",
        "        let part = self.object(builder, number).await?;\n        fault",
        """        if MUTANT {
            let (object, part): (Bytes, NewPart) = builder.build(self.object_key(number));
            let commit =
                self.patiently("commit a part", || self.store.commit_part(&self.segment, self.epoch, &part)).await?;
            fault::point(Fault::PartObject);
            self.patiently("write a part", || self.blobs.put(&part.object_key, object.clone())).await?;
            return if commit == Commit::Done { Ok(part) } else { Err(Stop::Lost) };
        }
        let part = self.object(builder, number).await?;
        fault""")], [BETWEEN]),
    Mutant("upload-note", "an upload's object is not noted before it is written", [("src/ingest/upload.rs",
        "        store.begin_upload(&object_key).await?;",
        "        if !MUTANT {\n            store.begin_upload(&object_key).await?;\n        }")], [BETWEEN]),
    Mutant("torn-counts", "a torn part's counts are not taken back", [(PARTS,
        "                count(&mut row, &one.content, -1);",
        "                if !MUTANT {\n                    count(&mut row, &one.content, -1);\n                }")],
        ["store dropped_parts_are_counted_back_once", SIMULATION]),
    Mutant("part-whole", "a torn part is taken for a whole one", [("src/scheduler/segment.rs",
        "object.is_some_and(|object| is_whole(&part.content, &object))",
        "object.is_some_and(|object| MUTANT || is_whole(&part.content, &object))")],
        ["engine torn_and_missing_parts_are_run_again"]),
    Mutant("part-crc", "a part's checksum is not looked at", [("src/scheduler/segment.rs",
        "&& crc32c::crc32c(object) == part.crc32c", "&& (MUTANT || crc32c::crc32c(object) == part.crc32c)")],
        ["engine a_part_with_a_changed_byte_is_run_again"]),
    Mutant("merge-crc", "a part is merged without a look at its checksum", [("src/results/merge.rs",
        "|(part, crc)| part.crc32c != *crc)", "|(part, crc)| !MUTANT && part.crc32c != *crc)")],
        ["engine a_part_whose_byte_changes_while_its_segment_runs_is_not_merged_but_run_again"]),
    Mutant("read-crc", "a segment is handed out without a look at its checksum", [("src/results/checked.rs",
        "        if crc32c.is_some_and(|expected| expected != crc) {",
        "        if crc32c.is_some_and(|expected| expected != crc) && !MUTANT {")],
        ["api a_changed_byte_is_data_loss_and_names_the_segment"]),
    Mutant("read-short", "a torn object ends its file early", [("src/results/checked.rs",
        "        if at != length {", "        if at != length && !MUTANT {")],
        ["api a_torn_input_does_not_just_end"]),
    Mutant("stream-crc", "results are streamed without a look at their checksum", [("src/results/checked.rs",
        "    if crc32c.is_some_and(|expected| expected != crc32c::crc32c(bytes)) {",
        "    if crc32c.is_some_and(|expected| expected != crc32c::crc32c(bytes)) && !MUTANT {")],
        ["api a_changed_byte_is_data_loss_and_names_the_segment"]),
    Mutant("retry-crc", "failed lines are tried again without a look at the input's checksum", [("src/service/retry.rs",
        "segment.span.crc32c.is_some_and(|crc| crc != crc32c::crc32c(&bytes))",
        "(segment.span.crc32c.is_some_and(|crc| crc != crc32c::crc32c(&bytes)) && !MUTANT)")],
        ["api a_changed_byte_is_data_loss_and_names_the_segment"]),
    Mutant("scope", "a query finds everybody's rows, whoever asks", [("src/store/scoped.rs",
        "    match scope.owner() {", "    match scope.owner().filter(|_| !MUTANT) {")],
        ["api another_owners_ids_are_as_good_as_none_in_every_rpc",
         "api another_owners_ids_are_as_good_as_none_on_every_http_path"]),
    Mutant("scope-cancel", "anybody cancels anybody's batch", [("src/store/batches.rs",
        "            let found = lock_batch(&tx, id).await?.filter(|row| scope.sees(&row.owner.as_str().into()));\n            let Some(mut row) = found else",
        "            let found = lock_batch(&tx, id).await?.filter(|row| MUTANT || scope.sees(&row.owner.as_str().into()));\n            let Some(mut row) = found else")],
        ["api another_owners_ids_are_as_good_as_none_in_every_rpc"]),
    Mutant("scope-delete", "anybody deletes anybody's batch", [("src/store/batches.rs",
        "            let found = lock_batch(&tx, id).await?.filter(|row| scope.sees(&row.owner.as_str().into()));\n            let Some(row) = found else { return roll_back(DeletedBatch",
        "            let found = lock_batch(&tx, id).await?.filter(|row| MUTANT || scope.sees(&row.owner.as_str().into()));\n            let Some(row) = found else { return roll_back(DeletedBatch")],
        ["api another_owners_ids_are_as_good_as_none_in_every_rpc"]),
    Mutant("undone-by-sqlite", "a connection whose transaction SQLite undid by itself is used again", [("src/store/mod.rs",
        "Ok(!connection.is_in_transaction())",
        "Ok(MUTANT || !connection.is_in_transaction())")],
        ["store a_transaction_that_sqlite_undid_by_itself_takes_no_later_one_with_it"]),
    Mutant("scope-list", "a list shows everybody's batches", [("src/store/pages.rs",
        "if let Some(owner) = self.filter.scope.owner() {",
        "if let Some(owner) = self.filter.scope.owner().filter(|_| !MUTANT) {")],
        ["api no_rpc_without_a_name_tells_or_takes_what_is_another_owners"]),
    Mutant("complete-once", "an upload in parts becomes a file however it has ended", [("src/store/uploads.rs",
        "&Scope::Of(owner.clone())).await? {\n        Some(row) if row.status == \"pending\" => {}",
        "&Scope::Of(owner.clone())).await? {\n        Some(row) if MUTANT || row.status == \"pending\" => {}")],
        ["store an_upload_becomes_one_file_and_its_parts_go_with_it"]),
    Mutant("request-hash", "an idempotency key stands for whatever is asked next", [("src/store/batches.rs",
        "is_some_and(|(first, now)| first != now)", "is_some_and(|(first, now)| first != now && !MUTANT)")],
        ["store the_same_request_id_is_the_same_batch"]),
    Mutant("messages-endpoint", "Anthropic's clients get batches of every endpoint", [("src/service/message_batches.rs",
        "        if batch.endpoint != Endpoint::Messages {", "        if batch.endpoint != Endpoint::Messages && !MUTANT {")],
        ["openai one_batch_is_the_same_in_all_dialects_and_others_are_unknown_here"]),
    Mutant("requests-left", "the requests of a batch that can't be made stay", [("src/service/message_batches.rs",
        "        let _ = self.parts.store.delete_file(&file.id, &caller.scope()).await;",
        "        let _ = if MUTANT { Ok(()) } else { self.parts.store.delete_file(&file.id, &caller.scope()).await.map(drop) };")],
        ["openai a_repeated_creation_with_a_key_is_the_same_batch"]),
    Mutant("requests-stay", "the requests of a deleted batch stay", [("src/store/batches.rs",
        "                .filter(file::Column::Id.eq(&row.input_file_id))",
        "                .filter(file::Column::Id.eq(if MUTANT { \"\" } else { &row.input_file_id }))")],
        ["openai a_batch_is_made_shown_run_read_and_deleted"]),
    Mutant("input-crc", "an input is run without a look at its checksum", [("src/scheduler/segment.rs",
        "Some(bytes) if span.crc32c.is_some_and(|expected| expected != crc32c::crc32c(&bytes)) =>",
        "Some(bytes) if span.crc32c.is_some_and(|expected| expected != crc32c::crc32c(&bytes) && !MUTANT) =>")],
        ["engine an_input_with_a_changed_byte_is_not_run"]),
    Mutant("torn-limit", "lines whose results are garbled are run again for ever", [("src/scheduler/segment.rs",
        "        if *torn >= TORN_LIMIT {", "        if *torn >= TORN_LIMIT && !MUTANT {")],
        ["engine a_blob_store_that_garbles_all_results"]),
    Mutant("room-kept", "one tenant may fill a node", [("src/scheduler/claiming.rs",
        "                if !self.demand.has_room_for(rank.tenant()) {",
        "                if !self.demand.has_room_for(rank.tenant()) && !MUTANT {")],
        ["engine hundreds_of_slow_batches_of_one_owner"]),
    Mutant("failed-freed", "what was finished of a failed batch stays for ever", [("src/store/files.rs",
        '        if row.kind == "input" {', '        if row.kind == "input" && !MUTANT {')],
        ["store a_failed_batch_is_freed_with_its_input"]),
    Mutant("part-twice", "the same part again counts again", [(PARTS,
        "        if known.is_some() {", "        if known.is_some() && !MUTANT {")],
        ["store a_part_repeated_counts_once", SIMULATION]),
    Mutant("end-twice", "the same end again is refused", [(PARTS,
        "if ours.is_some() { Commit::Done }", "if ours.is_some() && !MUTANT { Commit::Done }")],
        ["store the_last_segment_ends_the_batch", SIMULATION]),
    Mutant("end-lines", "when a batch is cancelled or expires, finished lines end again", [("src/scheduler/lines.rs",
        ".filter(|(_, line)| line.open)", ".filter(|(_, line)| line.open || MUTANT)")],
        ["engine cancelling_keeps_what_is_done_and_frees_the_worker", SIMULATION]),
    Mutant("event", "a state without its event", [(EVENTS,
        "    append(tx, row, at).await?;\n    if telling",
        "    if !MUTANT {\n        append(tx, row, at).await?;\n    }\n    if telling")],
        ["store the_last_segment_ends_the_batch", SIMULATION]),
    Mutant("outbox", "a batch's end and its webhook in two transactions", [
        (EVENTS, "    webhooks::enqueue_state(tx, row, status, at).await",
        "    if MUTANT && status == BatchStatus::Completed {\n        return Ok(());\n    }\n"
        "    webhooks::enqueue_state(tx, row, status, at).await"),
        (PARTS, """            if !ended {
                row.revision += 1;
                webhooks::enqueue_progress(&tx, &mut row, at).await?;
                row.into_active_model().reset_all().update(&tx).await?;
            }
            announce(tx, &of.batch, Commit::Done)
""", """            let status = row.status.clone();
            if !ended {
                row.revision += 1;
                webhooks::enqueue_progress(&tx, &mut row, at).await?;
                row.into_active_model().reset_all().update(&tx).await?;
            }
            if MUTANT && convert::status(&status)? == crate::domain::BatchStatus::Completed {
                tx.commit().await?;
                self.changed(&of.batch);
                let tx = self.begin().await?;
                if let Some(row) = lock_batch(&tx, &of.batch).await? {
                    webhooks::enqueue_state(&tx, &row, crate::domain::BatchStatus::Completed, at).await?;
                }
                return announce(tx, &of.batch, Commit::Done);
            }
            announce(tx, &of.batch, Commit::Done)
""")], ["webhooks atomic::"]),
    Mutant("attempt-late", "no row of an attempt before it is sent", [(OUTBOX,
        "        webhook_attempt::Entity::insert_many(attempts).exec_without_returning(tx).await?;\n",
        "        if !MUTANT {\n            webhook_attempt::Entity::insert_many(attempts).exec_without_returning(tx).await?;\n"
        "        }\n")], ["webhooks a_claim_leaves_its_attempt_and_is_exclusive", SIMULATION]),
    Mutant("attempt-uncounted", "a claim does not count its attempt", [(STEPS,
        "        row.attempts = step.attempts;\n",
        "        row.attempts = step.attempts - i32::from(MUTANT && input == Input::Claimed);\n")],
        ["webhooks a_lease_that_ran_out_is_an_unknown_attempt", SIMULATION]),
    Mutant("settle-lease", "a delivery is settled by whoever lost its lease", [(SETTLE,
        "row.lease_token.as_deref() == Some(&one.lease)", "(row.lease_token.as_deref() == Some(&one.lease) || MUTANT)")],
        ["webhooks whoever_lost_its_lease_changes_nothing", SIMULATION]),
    Mutant("settle-beside", "a late result takes the place of the right one beside it", [(SETTLE,
        "        let row = mine.then(|| rows.remove(one.id.as_str())).flatten();",
        "        if MUTANT && !mine {\n            rows.remove(one.id.as_str());\n        }\n"
        "        let row = mine.then(|| rows.remove(one.id.as_str())).flatten();")],
        ["webhooks late::", SIMULATION]),
    Mutant("reap-early", "a lease on a delivery ends before its time", [(SETTLE,
        "    if !all {\n        find = find", "    if !all && !MUTANT {\n        find = find")],
        ["webhooks a_lease_that_ran_out_is_an_unknown_attempt", SIMULATION]),
    Mutant("reap-never", "a lease on a delivery never ends", [(SETTLE,
        "webhook_delivery::Column::LeaseExpiresAt.lt(at.0)",
        "webhook_delivery::Column::LeaseExpiresAt.lt(if MUTANT { 0 } else { at.0 })")],
        ["webhooks whoever_lost_its_lease_changes_nothing", SIMULATION]),
    Mutant("dead-letter", "no dead letter after the last attempt", [(STEPS,
        "        bury(tx, change, at).await?;", "        if !MUTANT {\n            bury(tx, change, at).await?;\n        }")],
        ["webhooks failures_end_as_a_dead_letter", SIMULATION]),
    Mutant("step-input", "what a result means for its delivery is not what the state machine says", [
        ("src/domain/webhook/state.rs",
        "            Some(Some(error)) if error.kind.is_for_good() => Self::FailedForGood,",
        "            Some(Some(error)) if error.kind.is_for_good() && !MUTANT => Self::FailedForGood,")],
        ["webhooks any_order_of_results_settles_each_lease_once", SIMULATION]),
    Mutant("retry-busy", "two retries of a dead letter at a time", [(DEAD,
        "if row.lease_expires_at.is_some_and(|until| until >= at.0) {\n                return roll_back(BeginRetry::Busy);",
        "if row.lease_expires_at.is_some_and(|until| until >= at.0) && !MUTANT {\n                return roll_back(BeginRetry::Busy);")],
        ["webhooks of_two_retries_at_the_same_time_one_sends", SIMULATION]),
    Mutant("retry-lost", "a retry whose sender is gone stays as begun when the next one begins", [(DEAD,
        "        if row.lease_expires_at.is_some() {\n", "        if row.lease_expires_at.is_some() && !MUTANT {\n")],
        ["webhooks late::", SIMULATION]),
    Mutant("retry-lease", "a retry is written down by whoever lost its lease", [(DEAD,
        "if row.lease_token.as_deref() != Some(&claim.lease) {",
        "if row.lease_token.as_deref() != Some(&claim.lease) && !MUTANT {")], ["webhooks late::", SIMULATION]),
    Mutant("retry-success", "a retry's success is not kept", [(DEAD,
        "None => row.retry_success = true,", "None => row.retry_success = !MUTANT,")],
        ["webhooks a_retry_is_sent_once_and_not_again_unless_forced", SIMULATION]),
    Mutant("retry-request-id", "a retry's request id is not kept", [(DEAD,
        "attempt.request_id = request_id.map(str::to_owned);",
        "attempt.request_id = request_id.map(str::to_owned).filter(|_| !MUTANT);")],
        ["webhooks a_request_id_makes_a_retry_idempotent"]),
    Mutant("cut-off", "a text that the engine cut off is an answer", [("src/domain/answer.rs",
        '"cancelled" | "canceled" | "failed" => {', '"cancelled" | "canceled" | "failed" if !MUTANT => {')],
        ["engine a_text_that_the_engine_cut_off", "engine a_worker_that_is_put_to_sleep"]),
    Mutant("answer-memory", "answers do not wait for memory", [("src/fleet/memory.rs",
        "        self.waits.fetch_add(1, Ordering::Relaxed);\n        // It is never closed.",
        "        if MUTANT {\n            return None;\n        }\n"
        "        self.waits.fetch_add(1, Ordering::Relaxed);\n        // It is never closed.")],
        ["process large_answers_cost_bounded_memory"]),
]


def mutated():
    """The files of the working tree, with the edits."""
    listed = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    names = [name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]
    files = {name: (ROOT / name).read_bytes() for name in names}
    files["src/lib.rs"] += SEAM.encode()
    stale = []
    for mutant in MUTANTS:
        for name, old, new in mutant.edits:
            text = files[name].decode()
            if text.count(old) != 1:
                stale.append(f"{mutant.name}: {name} has this {text.count(old)} times:\n{old}")
            files[name] = text.replace(old, new.replace("MUTANT", f'crate::mutant("{mutant.name}")')).encode()
    if stale:
        sys.exit("the source has changed; write these mutants anew:\n\n" + "\n\n".join(stale))
    return files


def missing():
    """The tests that are named here and that no source has."""
    sources = {}
    for path in sorted((ROOT / "tests").glob("*/**/*.rs")):
        target = path.relative_to(ROOT / "tests").parts[0]
        sources[target] = sources.get(target, "") + f"mod {path.stem};\n" + path.read_text()
    for mutant in MUTANTS:
        for test in mutant.tests:
            target, name = test.split(" ")
            *modules, function = name.split("::")
            wanted = [f"mod {module};" for module in modules] + ([f"fn {function}"] if function else [])
            if not all(text in sources.get(target, "") for text in wanted):
                yield f"{mutant.name}: {test}"


def write(files):
    for path in SOURCE.rglob("*") if SOURCE.exists() else []:
        if path.is_file() and str(path.relative_to(SOURCE)) not in files:
            path.unlink()
    for name, content in files.items():
        path = SOURCE / name
        # One that is as it was is left alone, and is not compiled again.
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def build(targets):
    command = ["cargo", "test", "--no-run", "--message-format", "json-render-diagnostics"]
    for target in targets:
        command += ["--test", target]
    environment = os.environ | {"CARGO_TARGET_DIR": str(WORK / "target"), "CARGO_INCREMENTAL": "0"}
    done = subprocess.run(command, cwd=SOURCE, env=environment, stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("the mutants do not compile")
    found = {}
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["kind"] == ["test"]:
            found[message["target"]["name"]] = message["executable"]
    return found


def run(executables, test, mutant=None):
    """Whether it passes, and how long it took."""
    target, tests = test.split(" ")
    environment = {name: value for name, value in os.environ.items() if name != "TIDEMILL_MUTANT"}
    environment |= {"RUST_BACKTRACE": "0", "CARGO_MANIFEST_DIR": str(SOURCE)} | ({"TIDEMILL_MUTANT": mutant} if mutant else {})
    began = time.monotonic()
    try:
        done = subprocess.run([executables[target], tests], cwd=SOURCE, env=environment, timeout=LIMIT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return False, LIMIT
    if not re.search(r"running [1-9]\d* tests?", done.stdout):
        sys.exit(f"there is no test {test}")
    if mutant is None and done.returncode != 0:
        print(done.stdout[-4_000:])
    return done.returncode == 0, time.monotonic() - began


def main():
    asked = sys.argv[1:]
    if {"-h", "--help"} & set(asked):
        print(__doc__)
        return
    if asked == ["--list"]:
        for mutant in MUTANTS:
            print(f"{mutant.name:18} {mutant.what}")
        return
    if asked == ["--check"]:
        mutated()
        if gone := list(missing()):
            sys.exit("there are no such tests:\n" + "\n".join(gone))
        print(f"the source has the texts of all {len(MUTANTS)} mutants, and their tests")
        return
    known = {mutant.name for mutant in MUTANTS}
    if not known.issuperset(asked):
        sys.exit(f"no such mutant: {', '.join(set(asked) - known)}; see --list")
    chosen = [mutant for mutant in MUTANTS if not asked or mutant.name in asked]
    write(mutated())
    tests = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    executables = build(sorted({test.split(" ")[0] for test in tests}))
    for test in tests:
        passes, seconds = run(executables, test)
        print(f"without a mutant  {'passes' if passes else 'FAILS':9} {test}  ({seconds:.0f} s)", flush=True)
        if not passes:
            sys.exit("a test that fails by itself shows nothing")
    survived = 0
    for mutant in chosen:
        for test in mutant.tests:
            passes, seconds = run(executables, test, mutant.name)
            survived += passes
            print(f"{mutant.name:17} {'SURVIVED' if passes else 'killed':9} {test}  ({seconds:.0f} s)", flush=True)
    print(f"\n{len(chosen)} mutants, {survived} survived a test that should see them")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
