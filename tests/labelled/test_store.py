"""The images of a set: read once for all sizes, hashed as on screen; what lies outside the fan."""
import numpy as np
import torch
from picture_tools import noise
from PIL import Image, ImageDraw

from frames.images import Frame, resize_square
from frames.leakage import content_hash, perceptual_hash
from labelled import store
from training import probes


def test_images_are_read_once_for_all_sizes_and_hashed_as_on_screen():
    frames, loaded = [noise(1, 20 + i, seed=i)[0] for i in range(5)], []

    def load(i):
        loaded.append(i)
        return Frame(255 - frames[i], frames[i])

    images = store.Images(5, load)
    squares = images.read([16, 24])
    assert sorted(loaded) == [0, 1, 2, 3, 4] and squares.keys() == {16, 24}
    whole = Frame(255 - frames[2], frames[2]).whole
    assert images.content[2] == content_hash(whole) and (images.looks[2] == perceptual_hash(whole)).all()
    grey = Frame(255 - frames[2], frames[2]).grey
    assert (squares[16][2] == resize_square(grey, 16)).all() and (squares[24][2] == resize_square(grey, 24)).all()
    assert images.at(24) is squares[24] and len(loaded) == 5, "a size that is there was read again"
    assert images.at(8).shape == (5, 8, 8) and len(loaded) == 10


# ---------------------------------------------------------------- outside the fan

def screen(label, seed, inside=None, corner=True):
    """240 x 320 with a fan of speckle, in which a bright disc tells `inside`, and the label as text beside it."""
    image = Image.new("L", (320, 240))
    draw = ImageDraw.Draw(image)
    fan = Image.new("L", (320, 240))
    ImageDraw.Draw(fan).pieslice((40, -170, 280, 230), 50, 130, fill=1)
    speckle = np.random.default_rng(seed).integers(40, 160, (240, 320))
    grey = np.where(np.asarray(fan), speckle, 0).astype(np.uint8)
    if inside is not None:
        y, x = (180, 130) if inside else (180, 190)
        grey[y - 20:y + 20, x - 20:x + 20] = 255
    if corner:
        draw.text((4, 205), ("HEAD", "LEGS", "BELLY")[label], fill=255, font_size=15)
    return np.maximum(grey, np.asarray(image))


def vectors_outside(frames, groups):
    def load(i):
        return Frame(frames[i], frames[i])

    show, partly = store.outside_fans(load, groups)
    squares = store.Images(len(frames), load, show).at(64)
    return torch.from_numpy(squares).float().flatten(1), partly


def accuracy(x, labels, shots=3, episodes=10):
    rng, right = np.random.default_rng(0), []
    for _ in range(episodes):
        support = np.stack([rng.choice(np.flatnonzero(labels == k), shots, replace=False) for k in np.unique(labels)])
        predicted = probes.nearest_mean(x, torch.from_numpy(support)[None])[0].numpy()
        query = ~np.isin(np.arange(len(labels)), support)
        right.append((predicted == labels)[query].mean())
    return np.mean(right)


def test_a_label_written_beside_the_fan_is_found():
    labels = np.arange(24) % 3
    x, partly = vectors_outside([screen(label, i) for i, label in enumerate(labels)], np.arange(24))
    assert partly.all() and accuracy(x, labels) > 0.95


def test_what_only_the_fan_shows_is_not():
    labels = np.arange(24) % 2
    frames = [screen(0, i, inside=label) for i, label in enumerate(labels)]
    whole = torch.from_numpy(np.stack([resize_square(frame, 64) for frame in frames])).float().flatten(1)
    assert accuracy(whole, labels) > 0.95
    assert accuracy(vectors_outside(frames, np.arange(24))[0], labels) < 0.65


def test_outside_is_kept_as_it_is_and_the_fan_takes_the_background():
    frame = np.where(screen(0, 1, corner=False) > 0, screen(0, 1, corner=False), 17)  # a grey background
    frame[200:220, 4:60] = np.where(screen(2, 1)[200:220, 4:60] > 0, 255, 17)  # text
    show, partly = store.outside_fans(lambda i: Frame(frame, frame), ["a"])
    shown = show(0, frame)
    assert shown.dtype == np.uint8 and shown.shape == frame.shape and partly.tolist() == [True]
    assert (shown[200:220, 4:60] == frame[200:220, 4:60]).all() and (shown[60:200, 100:220] == 17).all()
    assert set(np.unique(shown)) == {17, 255}


def test_images_of_a_group_share_the_fan_of_their_maximum():
    """A frame dark on one side alone shows its lit side; the clip's other frames tell that all of it is fan."""
    left, right = screen(0, 1, corner=False), screen(0, 2, corner=False)
    left[:, 165:], right[:, :155] = 0, 0
    left[150:154, 230:234] = 200  # a lone echo in the dark half

    def load(i):
        frame = (left, right)[i]
        return Frame(frame, frame)

    alone, _ = store.outside_fans(load, ["a", "b"])
    clip, _ = store.outside_fans(load, ["a", "a"])
    assert alone(0, left)[150:154, 230:234].all(), "this still's fan is its lit half"
    assert not clip(0, left)[150:154, 230:234].any() and not clip(1, right).any()


def test_images_of_a_group_but_of_another_size_have_their_own_fan():
    small, large = screen(0, 1, corner=False), screen(0, 2, corner=False).repeat(2, 0).repeat(2, 1)
    frames = [small, large, small]
    show, partly = store.outside_fans(lambda i: Frame(frames[i], frames[i]), ["a"] * 3)
    assert partly.all() and [show(i, frame).shape for i, frame in enumerate(frames)] == [f.shape for f in frames]
    assert not show(1, large).any()


def test_an_image_that_is_all_fan_has_no_outside():
    full = np.random.default_rng(0).integers(0, 256, (60, 80)).astype(np.uint8)
    frames = [full, screen(0, 1)]
    show, partly = store.outside_fans(lambda i: Frame(frames[i], frames[i]), ["a", "b"])
    assert partly.tolist() == [False, True] and len(np.unique(show(0, full))) == 1
