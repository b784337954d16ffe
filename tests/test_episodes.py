"""Few-shot episodes: support and query share no group, and what is drawn depends on seed, shots and episode alone."""

import numpy as np
import pytest

import fewshot
from scores import metrics


def counts_of(labels, groups):
    confusion = metrics.group_confusion(labels, labels, groups, labels.max() + 1, groups.max() + 1)
    return confusion.diagonal(axis1=1, axis2=2)  # (G, K)


def layout(name):
    """Labels and groups of a few kinds of test set."""
    rng = np.random.default_rng(1)
    if name == "each image its own group":
        return np.arange(40) % 4, np.arange(40)
    if name == "patients of one class, unequal":
        groups = rng.choice(24, 200, p=np.arange(1, 25) / 300)
        groups = np.unique(groups, return_inverse=True)[1]
        return groups % 3, groups
    if name == "patients with all classes":
        return np.arange(72) % 6, np.arange(72) // 12
    if name == "patients with some classes":
        return rng.integers(0, 3, 120), np.arange(120) // 8
    groups = np.repeat(np.arange(24), [10, 1] * 12)  # 12 classes of two patients: one order in 4096 leaves 10 images
    return groups // 2, groups


LAYOUTS = ["each image its own group", "patients of one class, unequal", "patients with all classes",
           "patients with some classes", "tight: all of a patient but one image"]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shots", [1, 5])
def test_episode(name, shots):
    labels, groups = layout(name)
    counts = counts_of(labels, groups)
    fewshot.check_shots(counts, shots, list("abcdefghijkl")[:counts.shape[1]])
    for episode in range(20):
        support, query = fewshot.draw_episode(labels, groups, counts, shots, 0, episode)
        assert support.shape == (counts.shape[1], shots) and len(np.unique(support)) == support.size
        assert (labels[support] == np.arange(counts.shape[1])[:, None]).all()
        touched = np.isin(groups, groups[support])
        assert (query == ~touched).all(), "the query is every image of the other groups, and no other"
        assert set(labels[query]) == set(labels), "a class has no query image"
        for label, images in enumerate(support):
            used, times = np.unique(groups[images], return_counts=True)
            free = counts[:, label].copy()
            free[np.unique(groups[query])] = 0
            if name in LAYOUTS[:2] and (counts[:, label] > 0).sum() > shots:
                assert len(used) == shots, "two images of a patient though there are enough patients"
            # in turn: a group gives one more than another only where the other has no more
            assert all(times[i] >= times.max() - 1 or times[i] == counts[used[i], label] for i in range(len(used)))


def test_episodes_depend_on_seed_shots_and_episode_alone():
    labels, groups = layout("patients of one class, unequal")
    counts = counts_of(labels, groups)

    def draw(*key):
        np.random.seed(len(key))  # global state is not read
        return fewshot.draw_episode(labels, groups, counts, *key)[0].tolist()

    assert draw(5, 0, 3) == draw(5, 0, 3)
    assert len({str(sorted(draw(*key))) for key in ((5, 0, 3), (5, 0, 4), (5, 1, 3))}) == 3


def test_every_image_and_group_gets_its_turn():
    labels, groups = layout("patients of one class, unequal")
    counts, seen, asked = counts_of(labels, groups), set(), set()
    for episode in range(300):
        support, query = fewshot.draw_episode(labels, groups, counts, 2, 0, episode)
        seen.update(support.flatten().tolist())
        asked.update(np.flatnonzero(query).tolist())
    assert len(asked) == 200 and set(groups[list(seen)]) == set(groups)


def test_largest_shots_in_the_message_is_the_largest_that_works():
    rng = np.random.default_rng(2)
    for _ in range(20):
        groups = np.unique(rng.integers(0, 12, 60), return_inverse=True)[1]
        labels = groups % 2
        counts = counts_of(labels, groups)
        largest = min((own.sum() - own[own > 0].min()) for own in counts.T)  # all but the smallest group of a class
        fewshot.check_shots(counts, largest, ["a", "b"])
        assert fewshot.draw_episode(labels, groups, counts, largest, 0, 0)[0].shape == (2, largest)
        with pytest.raises(ValueError, match=f"--shots up to {largest} works"):
            fewshot.check_shots(counts, largest + 1, ["a", "b"])
