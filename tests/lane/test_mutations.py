"""Every clause that the lane's safety rests on, left out: some test of this directory notices.

Not here are looks that another one backs, so that no test can tell: at a gate's flags, a tag and
valid pages before the data is read (after that they are looked at once more), and at a gate's flags
for writes before the turn and in it. Nor that the thread for cold reads ends after its last one:
the kernel takes back what is under way when it ends sooner, and nobody answers then.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fusecache.fuse import queues
from tests.lane import build


class Mutation(NamedTuple):
    """A change of one place in one file, and the tests (``pytest -k``) that find it."""

    file: str
    old: str
    new: str
    tests: str


MUTATIONS = {
    "the generation is not looked at again": Mutation(
        "core.c",
        "LOAD(&core->generation[extent->slot]) != extent->generation)",
        "!extent->slot + 1 == 0)",
        "test_reads.py and meanwhile or came_back",
    ),
    "valid pages are not looked at again": Mutation(
        "core.c",
        "        if ((LOAD(&core->valid[extent->slot]) & extent->pages) != extent->pages ||\n",
        "        if (",
        "test_reads.py and invalidated_meanwhile",
    ),
    "only the first block is looked at again": Mutation(
        "core.c",
        "for (unsigned i = 0; i < found->count; i++) {\n"
        "        const struct extent *extent = &found->extents[i];\n"
        "        if ((LOAD(",
        "for (unsigned i = 0; i < 1; i++) {\n"
        "        const struct extent *extent = &found->extents[i];\n"
        "        if ((LOAD(",
        "test_reads.py and every_block",
    ),
    "the gate is not looked at again": Mutation(
        "core.c",
        "return (LOAD(&gate->flags) & GATE_READS) && LOAD(&gate->image) == found->image;",
        "return gate != NULL;",
        "test_reads.py and shut_meanwhile",
    ),
    "the image behind the gate is not looked at again": Mutation(
        "core.c",
        " && LOAD(&gate->image) == found->image;",
        ";",
        "test_reads.py and another_image_meanwhile",
    ),
    "marks are not looked at": Mutation(
        "core.c",
        "if (mark != NO_BLOCK && mark >= first && mark <= last)",
        "if (mark == 0x12345678 && first == last)",
        "test_reads.py and marked",
    ),
    "a read goes on past the end of the image": Mutation(
        "core.c",
        "    if (length > size - offset)\n        length = (uint32_t)(size - offset);\n",
        "",
        "test_reads.py and image_ends",
    ),
    "pieces of a read overwrite each other": Mutation(
        "cold.c",
        "read->buffer->bytes + read->done, length,",
        "read->buffer->bytes, length,",
        "test_reads.py and pieces",
    ),
    "the rest of a block is read from its beginning": Mutation(
        "core.c",
        "    *position = found->extents[i].position + done;\n",
        "    *position = found->extents[i].position;\n",
        "test_reads.py and pieces",
    ),
    "a read that failed by io_uring is answered": Mutation(
        "cold.c",
        "    if (failed || !serve_hit(",
        "    if (!serve_hit(",
        "test_reads.py and device_that_fails",
    ),
    "a read that was interrupted has failed": Mutation(
        "cold.c",
        "bool failed = result <= 0 && result != -EINTR && result != -EAGAIN;",
        "bool failed = result <= 0 && result != -EAGAIN;",
        "test_reads.py and pieces",
    ),
    "what moved meanwhile is nobody's": Mutation(
        "cold.c",
        "        lane_queue(lane, &read->request, NULL);\n",
        "        (void)lane;\n",
        "test_reads.py and meanwhile and ring",
    ),
    "the room of a cold read is used once": Mutation(
        "cold.c",
        "    read->next = cold->free;\n    cold->free = read;\n    __atomic_fetch_sub",
        "    (void)read;\n    __atomic_fetch_sub",
        "test_reads.py and crowd",
    ),
    "the thread for cold reads is not woken": Mutation(
        "cold.c",
        "    cold->sleeps = true;",
        "    cold->sleeps = false;",
        "test_reads.py and alone",
    ),
    "the thread for cold reads is woken only if it has nothing": Mutation(
        "cold.c",
        "    cold->sleeps = true;",
        "    cold->sleeps = first == NULL;",
        "test_reads.py and sick_place",
    ),
    "one alone is handed over": Mutation(
        "serve.c",
        "if (cold_crowd(&lane->cold) || !lane_step_back(lane))",
        "if (cold_crowd(&lane->cold) || lane->ring || !lane_step_back(lane))",
        "test_reads.py and alone",
    ),
    "no turn is taken": Mutation(
        "serve.c",
        "    if (!turns_take(&lane->turns))\n        return false;\n",
        "    turns_take(&lane->turns);\n",
        "test_writes.py and turn",
    ),
    "python does not wait for a writer": Mutation(
        "turns.c",
        "    while (turns->lane_in)\n        pthread_cond_wait(&turns->python, &turns->mutex);\n",
        "",
        "test_writes.py and has_begun",
    ),
    "two writers have a turn at once": Mutation(
        "turns.c",
        "    if (turns->lane_in || turns->python_in || turns->python_waits) {",
        "    if (turns->python_in || turns->python_waits) {",
        "test_writes.py and with_each_other",
    ),
    "the first turn is nobody's": Mutation(
        "turns.c",
        "    turns->python_in = true;\n}\n\nvoid turns_destroy",
        "    turns->python_in = false;\n}\n\nvoid turns_destroy",
        "test_writes.py and first_turn",
    ),
    "cleaning bits stay": Mutation(
        "core.c",
        "        core->cleaning[slot] &= (uint16_t)~extent->pages;\n",
        "",
        "test_writes.py and writeback",
    ),
    "unsynced pages are not recorded": Mutation(
        "core.c",
        "        core->unsynced[slot] |= extent->pages;\n",
        "",
        "test_writes.py and unsynced",
    ),
    "unsynced slots are not recorded": Mutation(
        "core.c",
        "            core->soiled[(*core->soiled_count)++] = slot;\n",
        "            (void)slot;\n",
        "test_writes.py and unsynced",
    ),
    "more unsynced slots than there is room for": Mutation(
        "core.c",
        " ||\n        *core->soiled_count + found->count > core->soiled_room)",
        ")",
        "test_writes.py and full_list",
    ),
    "clean pages are written over": Mutation(
        "core.c",
        " ||\n            (core->dirty[extent->slot] & extent->pages) != extent->pages)",
        ")",
        "test_writes.py and not_all_dirty",
    ),
    "pinned slots are written over": Mutation(
        "core.c",
        "core->pins[extent->slot] ||",
        "core->pins[extent->slot] == 77 ||",
        "test_writes.py and stores_to",
    ),
    "a write goes on past the end of the image": Mutation(
        "core.c",
        "        offset > size || length > size - offset)\n        return false;\n"
        "    found->image = gate->image;",
        "        offset + size == 1)\n        return false;\n    found->image = gate->image;",
        "test_writes.py and past_the_end",
    ),
    "changes are not counted": Mutation(
        "serve.c", "        at->changes++;\n", "", "test_writes.py and written_over"
    ),
    "a failed write is answered": Mutation(
        "serve.c",
        "    if (!done)\n        return false; /*",
        "    if (0)\n        return false; /*",
        "test_writes.py and that_fails",
    ),
    "closes of writers are answered": Mutation(
        "serve.c",
        "        if (table_get(lane->readers_only, request->handle) == UINT32_MAX)\n",
        "        if (!request->handle)\n",
        "test_requests.py and who_only_reads",
    ),
    "a closed handle is remembered as a reader's": Mutation(
        "module.c",
        "    table_drop(self->lane.readers_only, handle);\n",
        "",
        "test_requests.py and who_only_reads",
    ),
    "answers are brought only when the loop waits": Mutation(
        "module.c",
        "seconds > 0 || self->answers_soon ||",
        "seconds > 0 ||",
        "test_answers.py and loop_goes_on",
    ),
    "only announced answers are brought": Mutation(
        "module.c",
        "seconds > 0 || self->answers_soon ||",
        "self->answers_soon ||",
        "test_answers.py and loop_goes_on",
    ),
    "a busy loop brings only announced answers": Mutation(
        "module.c",
        " || ++self->rounds == ROUNDS",
        "",
        "test_answers.py and loop_goes_on",
    ),
    "nobody makes room": Mutation(
        "module.c",
        "unanswered, __ATOMIC_RELAXED) > 1)",
        "unanswered, __ATOMIC_RELAXED) > 1000)",
        "test_answers.py and room",
    ),
    "requests without an answer hide answers": Mutation(
        "serve.c",
        "    add(&lane->unanswered, answered);\n",
        "    add(&lane->unanswered, answered ? 1 : (uint64_t)-1);\n",
        "test_answers.py and none_is_waited_for",
    ),
    "a request's own length is believed": Mutation(
        "request.c",
        "    if (header.len != size)\n        return;\n",
        "",
        "test_requests.py and wrong_length",
    ),
    "a write's length is believed": Mutation(
        "request.c",
        " || size - before != in.size)",
        ")",
        "test_requests.py and longer_or_shorter",
    ),
    "a body is believed to be there": Mutation(
        "request.c",
        "    if (size - sizeof(struct fuse_in_header) < length)\n        return 0;\n",
        "    if (size > 1u << 30)\n        return 0;\n",
        "test_requests.py and cut_short",
    ),
    "the number of forgets is believed": Mutation(
        "request.c",
        " ||\n        size - before != (uint64_t)in.count * sizeof(struct fuse_forget_one))",
        ")",
        "test_requests.py and lie_about",
    ),
    "only the first forgets are passed on": Mutation(
        "serve.c",
        "first += FORGETS)",
        "first = request->length)",
        "test_requests.py and in_parts",
    ),
    "the kernel may write more at a time than there is room for": Mutation(
        "serve.c",
        "if (init.max_write > LARGEST)",
        "if (init.max_write == 77)",
        "test_requests.py and no_room_for",
    ),
    "whoever is not run is taken for a slow device": Mutation(
        "serve.c",
        "waits() > waited)",
        "waits() >= waited)",
        "test_writes.py and busy_host",
    ),
    "privileges are said to be ours although the kernel knows of no such thing": Mutation(
        "serve.c",
        "can & FUSE_HANDLE_KILLPRIV_V2",
        "FUSE_HANDLE_KILLPRIV_V2",
        "test_requests.py and our_concern",
    ),
    "an fsync passes any gate": Mutation(
        "syncs.c",
        "__ATOMIC_ACQUIRE) & both) == both;",
        "__ATOMIC_ACQUIRE) & both) < 99;",
        "test_fsyncs.py and gate_does_not_let",
    ),
    "the gate is not looked at again after a sync": Mutation(
        "syncs.c",
        "if (!error && only_data(lane, fsync->gate)) {",
        "if (!error) {",
        "test_fsyncs.py and nobody_has_synced",
    ),
    "an fsync of which the sync failed is answered": Mutation(
        "syncs.c",
        "if (!error && only_data(lane, fsync->gate)) {",
        "if (error >= 0 && only_data(lane, fsync->gate)) {",
        "test_fsyncs.py and no_other",
    ),
    "there is another sync after one that failed": Mutation(
        "syncs.c",
        "                __atomic_store_n(&lane->syncs.failed, true, __ATOMIC_RELEASE);\n",
        "",
        "test_fsyncs.py and no_other",
    ),
    "who waits while a sync fails has another one": Mutation(
        "syncs.c",
        "if (__atomic_load_n(&lane->syncs.failed, __ATOMIC_ACQUIRE) || !begin(lane))",
        "if (!begin(lane))",
        "test_fsyncs.py and who_waits_while",
    ),
    "python does not hear of the error": Mutation(
        "syncs.c",
        "fsync->request.length = error > 0 ? (uint64_t)error : 0;",
        "fsync->request.length = 0;",
        "test_fsyncs.py and no_other",
    ),
    "a sync begins in anybody's turn": Mutation(
        "syncs.c",
        "if (turns_take(&lane->turns)) {",
        "if (turns_take(&lane->turns) || tries + 1 == MOST_TRIES) {",
        "test_fsyncs.py and waits_for_its_turn",
    ),
    "an fsync is answered before the sync": Mutation(
        "syncs.c",
        "error = fdatasync(lane->syncs.file) < 0 ? errno : 0;",
        "error = 0;",
        "test_fsyncs.py and after_a_sync",
    ),
    "what is synced stays unsynced": Mutation(
        "core.c",
        "        core->unsynced[slot] = 0;\n",
        "",
        "test_fsyncs.py and written_during",
    ),
    "nobody knows what is being synced": Mutation(
        "core.c",
        "core->syncs[SYNCING] = count;",
        "core->syncs[SYNCING] = 0;",
        "test_fsyncs.py and nobody_has_synced",
    ),
    "pages that are being synced are any": Mutation(
        "core.c",
        "core->syncing_pages[i] = core->unsynced[slot];",
        "core->syncing_pages[i] = 0;",
        "test_fsyncs.py and nobody_has_synced",
    ),
    "a sync that begins has no number": Mutation(
        "core.c",
        "    core->syncs[SYNCS_BEGUN]++;\n",
        "",
        "test_fsyncs.py and that_began_before",
    ),
    "nobody knows of a good sync": Mutation(
        "core.c",
        "core->syncs[SYNCS_BEGUN], __ATOMIC_RELEASE);",
        "0, __ATOMIC_RELEASE);",
        "test_fsyncs.py and python_stable",
    ),
    "what was synced is being synced": Mutation(
        "core.c",
        "    __atomic_exchange_n(&core->syncs[SYNCING], 0, __ATOMIC_SEQ_CST);\n",
        "",
        "test_fsyncs.py and not_lost_later",
    ),
    "two sync at a time": Mutation(
        "syncs.c",
        "        syncs->under_way = true;\n",
        "        (void)0;\n",
        "test_fsyncs.py and shares_the_next",
    ),
    "nobody goes on after a sync": Mutation(
        "syncs.c",
        "    syncs->under_way = false;\n",
        "",
        "test_fsyncs.py and shares_the_next",
    ),
    "what was handed over after a sync is nobody's": Mutation(
        "syncs.c",
        "        return ANSWER;\n",
        "        return WAIT;\n",
        "test_fsyncs.py and many",
    ),
    "what was handed over without a sync is answered": Mutation(
        "syncs.c",
        "if (good && syncs->idle",
        "if (syncs->idle",
        "test_fsyncs.py and in_vain",
    ),
    "a name leads out of its directory": Mutation(
        "names.c",
        " || leaves_its_directory(request))",
        " || (0 && leaves_its_directory(request)))",
        "test_names.py and lead_out",
    ),
    "another filesystem is looked at": Mutation(
        "names.c",
        "RESOLVE_CACHED | RESOLVE_NO_XDEV",
        "RESOLVE_CACHED",
        "test_names.py and another_filesystem",
    ),
    "the origin is asked for a name": Mutation(
        "names.c",
        "RESOLVE_CACHED | RESOLVE_NO_XDEV",
        "RESOLVE_NO_XDEV",
        "test_names.py and has_to_ask",
    ),
    "links are followed": Mutation(
        "names.c",
        "O_PATH | O_NOFOLLOW | O_CLOEXEC",
        "O_PATH | O_CLOEXEC",
        "test_names.py and opened_for_python",
    ),
    "a forgotten directory is used": Mutation(
        "module.c",
        "    table_drop(self->lane.directories, node);\n",
        "",
        "test_names.py and nobody_has_told",
    ),
    "attributes that have changed are told": Mutation(
        "attributes.c",
        "memcmp(&now, &told.answer.attr, sizeof now) == 0",
        "now.ino == told.answer.attr.ino",
        "test_attributes.py and what_changes",
    ),
    "another node's attributes are told": Mutation(
        "attributes.c",
        "    return told->node == node;\n",
        "    return told->fd >= 0 || node;\n",
        "test_attributes.py and takes_back",
    ),
    "another node's attributes are taken back": Mutation(
        "attributes.c",
        "    if (told->node == node)\n",
        "",
        "test_attributes.py and that_node_alone",
    ),
    "attributes are not taken back": Mutation(
        "attributes.c",
        "        told->node = 0;\n",
        "        (void)told;\n",
        "test_attributes.py and takes_back",
    ),
    "images are told of as they are": Mutation(
        "attributes.c",
        "same || S_ISDIR(st.st_mode)",
        "same || now.ino",
        "test_attributes.py and what_changes",
    ),
    "directories are told of as they were": Mutation(
        "attributes.c",
        "            told.answer.attr = now;\n",
        "",
        "test_attributes.py and of_a_directory",
    ),
    "directories that have changed are Python's": Mutation(
        "attributes.c",
        "same || S_ISDIR(st.st_mode)",
        "same",
        "test_attributes.py and of_a_directory",
    ),
    "the space is that of any node": Mutation(
        "attributes.c",
        "request->node != FUSE_ROOT_ID || !was_told(lane, FUSE_ROOT_ID, &told)",
        "!was_told(lane, request->node, &told)",
        "test_attributes.py and space",
    ),
    "the space of an origin that may hang is told": Mutation(
        "attributes.c",
        "!was_told(lane, FUSE_ROOT_ID, &told)",
        "!(was_told(lane, FUSE_ROOT_ID, &told), told.fd)",
        "test_attributes.py and space",
    ),
    "an open is taken for one of a handle": Mutation(
        "module.c",
        " ||\n                   request->kind == REQUEST_OPEN;",
        ";",
        "test_requests.py and says",
    ),
    "nobody knows whose an open is": Mutation(
        "request.c",
        "    request->length = header.pid;\n",
        "    (void)header;\n",
        "test_requests.py and says",
    ),
    "no read waits after an answer": Mutation(
        "attributes.c",
        "            hold(lane, gate);\n",
        "            (void)gate;\n",
        "test_attributes.py and waits_a_moment",
    ),
    "what nobody has taken stays open": Mutation(
        "lane.c",
        "        names_drop(&waiting->request);\n",
        "        (void)waiting;\n",
        "test_names.py and closed_at_the_end",
    ),
    "an open file is shared with python": Mutation(
        "lane.c",
        "lane->syncs.file = open(path, O_RDONLY | O_CLOEXEC);",
        "lane->syncs.file = fcntl(lane->device, F_DUPFD_CLOEXEC, 0);",
        "test_fsyncs.py and tells_each",
    ),
    "descriptors are the caller's": Mutation(
        "lane.c",
        "dup3(lane->nowhere, numbers[i], O_CLOEXEC) < 0",
        "close(numbers[i]) < 0",
        "test_ends.py and written_anywhere",
    ),
}

OF_QUEUES = {
    "nobody is asked if the image read last is gone": Mutation(
        "entries.c",
        "    if (queues->node && make_it_ask(lane, queues->node))\n",
        "    if (!queues->node || make_it_ask(lane, queues->node) || queues->node)\n",
        "test_queues.py and other_requests",
    ),
    "whoever is not answered yet keeps the place of others": Mutation(
        "entries.c",
        "share->entries, __ATOMIC_RELAXED) - away >= READY",
        "share->entries, 0) != 77",
        "test_queues.py and stalled",
    ),
    "an answer goes to any request": Mutation(
        "entries.c",
        "&all_queues->asked[i], __ATOMIC_RELAXED) == unique",
        "&all_queues->asked[i], __ATOMIC_RELAXED) != 0 && (asked = all_queues->asked[i])",
        "test_queues.py and stalled",
    ),
    "nobody is woken for what is handed over": Mutation(
        "entries.c", "    if (wake)\n", "    if (wake && !queues)\n", "test_queues.py and stalled"
    ),
    "what is passed on is taken for answered": Mutation(
        "queues.c",
        "if (entry->errand == TO_SERVE) {",
        "if (entry->errand == 77) {",
        "test_queues.py and at_once",
    ),
    "answers of others stay where they are": Mutation(
        "entries.c",
        "if (size && data != entry->buffer.bytes)",
        "if (size && !data)",
        "test_queues.py and says_so",
    ),
    "an answer has no end": Mutation(
        "entries.c",
        "    entry->room->rest = (uint32_t)size;\n",
        "    entry->room->rest = LARGEST;\n",
        "test_queues.py and says_so",
    ),
    "the fixed part is left out": Mutation(
        "entries.c", "room->fixed, fixed);", "room->header, fixed);", "test_queues.py and says_so"
    ),
    "all answers have the first request's name": Mutation(
        "entries.c",
        "    entry->commit = room->commit;\n",
        "    entry->commit = entry->commit ? entry->commit : room->commit;\n",
        "test_queues.py and says_so",
    ),
    "a cold hit is answered before it is read": Mutation(
        "queues.c",
        "    cold_go_on(entry->queues->lane, &entry->queues->ring, &entry->cold, -EAGAIN);",
        "    entry->reading = entry->queues->reading-- == 77;\n"
        "    serve_hit(entry->queues->lane, request, gate, found,\n"
        "              entry->buffer.bytes, true, began);",
        "test_queues.py and cold",
    ),
    "nobody gets a new entry who waited before it was there": Mutation(
        "entries.c", "    pump(queues, queue);\n", "    (void)pump;\n", "test_injected.py and 200"
    ),
}
"""Of the transport by the kernel's queues; found by tests/mount with ``--queues``."""


def _run(tests: str, env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    file, _, chosen = tests.partition(" and ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *options, f"tests/{file}", "-k", chosen],
        cwd=build.ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def _is_noticed(name: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, f"nothing notices that {name}: {done.stdout[-2000:]}"
    assert "failed" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTATIONS)
def test_something_notices(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    sources = build.broken_sources(tmp_path, mutation.file, mutation.old, mutation.new)
    env = {"FUSECACHE_LANE_SOURCES": str(sources)}
    _is_noticed(name, _run(f"lane/{mutation.tests}", env, "--timeout", "30"))


@pytest.mark.slow
@pytest.mark.mount
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", OF_QUEUES)
def test_something_notices_in_queues(name: str, tmp_path: Path) -> None:
    if not queues.ALLOWED.exists():
        pytest.skip("this kernel has no queues")
    mutation = OF_QUEUES[name]
    (tmp_path / "sources").mkdir()
    sources = build.broken_sources(tmp_path / "sources", mutation.file, mutation.old, mutation.new)
    module = build.build(tmp_path, "-Wno-error", sources=sources)
    env = build.instead(tmp_path, module)
    _is_noticed(name, _run(f"mount/{mutation.tests}", env, "--queues", "--timeout", "90"))
