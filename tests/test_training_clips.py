"""Batches of drawn length."""

from collections import Counter

import torch

from data.training_clips import crop_to_length
from diffusion.noise import generator_for


def test_every_length_and_every_place_of_it_is_drawn_as_often_as_the_others():
    clips = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 4)  # frame i shows i
    lengths = Counter()
    places = Counter()
    for i in range(1200):
        cropped = crop_to_length(clips, (6, 9), generator_for(i))
        shown = cropped[1, 2, :, 3, 3].tolist()
        first = int(shown[0])
        assert shown == list(range(first, first + len(shown)))
        lengths[len(shown)] += 1
        places[len(shown), first] += 1
    assert sorted(lengths) == [6, 7, 8, 9]
    # 300 expected of each, standard deviation 15; four of them.
    assert all(abs(count - 300) < 60 for count in lengths.values())
    for length in lengths:
        shares = [count for (drawn, _), count in places.items() if drawn == length]
        assert len(shares) == 10 - length
        # Of 300 draws at most a standard deviation of 9 per place; five of them.
        assert max(shares) - min(shares) < 45


def test_one_length_leaves_clips_as_they_are():
    clips = torch.rand(2, 3, 8, 4, 4)
    stream = generator_for(0)
    before = stream.get_state()
    assert crop_to_length(clips, (8, 8), stream) is clips
    assert torch.equal(stream.get_state(), before)
