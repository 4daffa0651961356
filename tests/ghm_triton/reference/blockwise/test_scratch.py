"""Memory kept from call to call: of each thread its own."""

import threading

import torch

from ghm_triton.reference.blockwise.scratch import Scratch


def test_it_is_kept_and_of_each_thread_its_own():
    def address():
        return Scratch().views(10)[0].data_ptr()

    here, elsewhere = address(), []
    assert address() == here
    thread = threading.Thread(target=lambda: elsewhere.append(address()))
    thread.start()
    thread.join()
    assert elsewhere[0] != here


def test_what_inference_mode_left_is_usable():
    left = []

    def first_call():
        with torch.inference_mode():
            Scratch().views(10)[0].fill_(1.0)
        left.append(Scratch().views(10)[0].mul_(2.0).sum().item())

    thread = threading.Thread(target=first_call)
    thread.start()
    thread.join()
    assert left == [20.0]


def test_views_follow_the_size_of_the_block():
    scratch = Scratch()
    for entries in (7, 8, 7):
        assert [len(view) for view in scratch.views(entries)] == [entries] * 4
        assert len(scratch.codes(entries)) == entries
        region, codes = scratch.small_integers(entries, paired=True)
        assert (len(region), len(codes)) == (entries, 4)
        assert region.data_ptr() == codes.data_ptr()
        region, codes = scratch.small_integers(entries, paired=False)
        assert region is codes
        assert len(region) == entries
