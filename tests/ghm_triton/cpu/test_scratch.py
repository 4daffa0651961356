"""Memory kept from call to call: of each thread its own."""

import threading

import torch

from ghm_triton.cpu.scratch import MOST_VIEWS, Scratch, here, walk


def elsewhere(function):
    """What a function returns on a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_it_is_kept_and_of_each_thread_its_own():
    assert here() is here()
    assert elsewhere(here) is not here()


def test_what_inference_mode_left_is_usable():
    def first_call():
        with torch.inference_mode():
            here().views(10).loss.fill_(1.0)
            here().length(10).fill_(1.0)
        return here().views(10).loss.mul_(2.0).sum() + here().length(10).mul_(2.0).sum()

    assert elsewhere(first_call) == 40


def test_it_grows_with_the_block(monkeypatch):
    before = here()
    more = before.entries + 1
    monkeypatch.setattr("ghm_triton.cpu.scratch.block_entries", lambda: more)
    assert here().entries == more
    assert here() is here()


def test_views_have_the_size_of_a_block_and_do_not_overlap():
    scratch = Scratch(9)
    for entries in (7, 8, 9, 1, 7):
        views, pairs = scratch.views(entries), (entries + 1) // 2
        alone = (views.slope, views.weight, scratch.length(entries), views.bytes, views.codes)
        for number, view in enumerate(alone):
            view.fill_(number)
        assert [view.tolist() for view in alone] == [
            [number] * len(view) for number, view in enumerate(alone)
        ]
        floats = (views.slope, views.weight, views.loss, scratch.length(entries))
        assert [len(view) for view in floats] == [entries] * 4
        assert len(views.bytes) == len(views.indices) == entries
        assert len(views.weight_pairs) == len(views.byte_pairs) == len(views.codes) == pairs
        assert views.weight_pairs.data_ptr() == views.weight.data_ptr()
        assert views.byte_pairs.data_ptr() == views.bytes.data_ptr()


def test_views_of_many_sizes_are_not_all_kept():
    scratch = Scratch(100)
    for entries in range(1, 100):
        assert len(scratch.views(entries).loss) == entries
        assert len(scratch._views) <= MOST_VIEWS


def test_a_walk_hands_out_memory_for_each_block():
    for span, views in walk(3, 5):
        assert len(views.slope) == span.entries == 15
