"""Augmentation: what is drawn, from what, and that nothing but its name decides a draw."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from blspkd.data.augment import Augmentation, WaveformAugmenter
from blspkd.data.augment_config import AugmentConfig, MaskConfig, NoiseConfig, ReverbConfig
from blspkd.data.batches import ClipDataset, LengthGroupedSampler
from blspkd.data.features import FeatureCache
from blspkd.data.manifest import read_manifest
from blspkd.model.bases import load_feature_extractor, load_tokenizer
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor
from blspkd.training.config import DataSection

RATE = 16_000
EVERYTHING = AugmentConfig(
    copies=2,
    speed=[0.9, 1.0, 1.1],
    telephone=0.5,
    noise=NoiseConfig(probability=0.8, babble_voices=2),
    reverb=ReverbConfig(probability=0.5),
    masks=MaskConfig(time=2),
)


@pytest.fixture(scope="module")
def records(tiny_corpus):
    return read_manifest(tiny_corpus.manifest)


@pytest.fixture(scope="module")
def model(tiny_model):
    return BlspKDForConditionalGeneration.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def processor(tiny_parts):
    return BlspKDProcessor(
        load_feature_extractor(str(tiny_parts.encoder)),
        load_tokenizer(str(tiny_parts.language_model)),
    )


def sound(seconds=1.0, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(
        "float32"
    )


def versions(augmenter, waveform, count=200):
    return [augmenter(waveform, clip_id="a", draw=str(number)) for number in range(count)]


def test_nothing_is_done_by_default(records):
    augmentation = Augmentation(AugmentConfig(), records, seed=0)
    clean, _ = soundfile.read(records[0].audio, dtype="float32")
    np.testing.assert_array_equal(augmentation.waveform(records[0], 3), clean)
    assert {augmentation.copy(records[0], epoch) for epoch in range(9)} == {0}
    mel, encoded = np.ones((4, 50), np.float32), torch.ones(25, 3)
    assert augmentation.mask_mel(mel, records[0], 0) is mel
    assert augmentation.mask_encoded(encoded, records[0], 0) is encoded


def test_a_version_has_a_name_and_nothing_else(records):
    augmenter = WaveformAugmenter(EVERYTHING, records)
    first = versions(augmenter, sound(), 12)
    again = WaveformAugmenter(EVERYTHING, records)
    for number in reversed(range(12)):
        heard = again(sound(), clip_id="a", draw=str(number))
        np.testing.assert_array_equal(heard, first[number])
    assert len({one.tobytes() for one in first}) == 12
    other_clip = augmenter(sound(), clip_id="b", draw="0")
    assert other_clip.tobytes() != first[0].tobytes()


def test_speeds_are_drawn_evenly_and_never_stretch_a_clip_beyond_the_encoder():
    augmenter = WaveformAugmenter(AugmentConfig(speed=[0.9, 1.0, 1.1]), [])
    lengths = [len(one) for one in versions(augmenter, sound(0.2), 300)]
    for factor in (0.9, 1.0, 1.1):
        near = sum(abs(length - 0.2 * RATE / factor) <= 1 for length in lengths)
        assert 70 < near < 130
    longest = 29 * RATE
    factors = {augmenter.speed_factor("a", draw=str(n), samples=longest) for n in range(50)}
    assert factors == {1.0, 1.1}


def test_noise_comes_as_often_and_as_loud_as_asked():
    config = AugmentConfig(noise=NoiseConfig(probability=0.3, snr_db=[5, 10], kinds=["white"]))
    clean = sound()
    ratios = [
        10 * np.log10(np.mean(clean**2) / np.mean((one - clean) ** 2))
        for one in versions(WaveformAugmenter(config, []), clean, 400)
        if not np.array_equal(one, clean)
    ]
    assert 85 < len(ratios) < 155
    assert 4.99 < min(ratios) < 5.5
    assert 9.5 < max(ratios) < 10.01


def test_babble_is_the_other_clips(records):
    config = AugmentConfig(
        noise=NoiseConfig(probability=1.0, snr_db=[0, 0], kinds=["babble"], babble_voices=1)
    )
    # of two clips only the other one can be heard: a tone of 310 Hz in the second of the corpus
    augmenter = WaveformAugmenter(config, records[:2])
    added = augmenter(sound(), clip_id=records[0].id, draw="0") - sound()
    spectrum = np.abs(np.fft.rfft(added))
    assert np.argmax(spectrum) == pytest.approx(310, abs=2)  # of one second: Hz
    with pytest.raises(ValueError, match="babble is made of other clips"):
        WaveformAugmenter(config, records[:1])


def test_folders_of_noises_and_rooms(tmp_path):
    (tmp_path / "noise").mkdir()
    hum = np.sin(2 * np.pi * 1000 * np.arange(RATE // 2) / RATE).astype(np.float32)
    soundfile.write(tmp_path / "noise" / "hum.wav", hum, RATE)
    (tmp_path / "rooms" / "deep").mkdir(parents=True)
    echo = np.zeros(801, np.float32)
    echo[0], echo[800] = 0.5, 0.25
    soundfile.write(tmp_path / "rooms" / "deep" / "echo.flac", echo, RATE)
    hummed = WaveformAugmenter(
        AugmentConfig(
            noise=NoiseConfig(
                probability=1.0, snr_db=[0, 0], kinds=[], folder=str(tmp_path / "noise")
            )
        ),
        [],
    )
    added = hummed(sound(), clip_id="a", draw="0") - sound()
    assert np.argmax(np.abs(np.fft.rfft(added))) == 1000
    roomy = WaveformAugmenter(
        AugmentConfig(reverb=ReverbConfig(probability=1.0, folder=str(tmp_path / "rooms"))), []
    )
    heard = roomy(sound(), clip_id="a", draw="0")
    expected = sound()
    expected[800:] += 0.5 * sound()[:-800]
    gain = np.sqrt(np.mean(sound() ** 2) / np.mean(expected**2))
    np.testing.assert_allclose(heard, gain * expected, atol=1e-3)
    with pytest.raises(ValueError, match="no audio file"):
        WaveformAugmenter(
            AugmentConfig(reverb=ReverbConfig(probability=0.1, folder=str(tmp_path / "noise/x"))),
            [],
        )


def test_one_effect_leaves_the_draws_of_the_others_alone():
    noise = NoiseConfig(probability=1.0, snr_db=[0, 20], kinds=["white", "pink"])
    plain = WaveformAugmenter(AugmentConfig(noise=noise), [])
    more = WaveformAugmenter(
        AugmentConfig(noise=noise, reverb=ReverbConfig(probability=0.5), telephone=0.2), []
    )
    same = [
        np.array_equal(one, other)
        for one, other in zip(
            versions(plain, sound(0.2), 100), versions(more, sound(0.2), 100), strict=True
        )
    ]
    assert 20 < sum(same) < 60  # 0.5 * 0.8 of them


def masked_spans(masked, original, axis):
    changed = (masked != original).all(axis=1 - axis)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], changed.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_masks_on_mel_features_stay_within_their_widths(records):
    config = AugmentConfig(masks=MaskConfig(time=1, time_width=0.3, frequency=1, frequency_width=9))
    augmentation = Augmentation(config, records, seed=0)
    mel = np.random.default_rng(0).standard_normal((80, 120)).astype(np.float32)
    before = mel.copy()
    times, frequencies = [], []
    for epoch in range(200):
        masked = augmentation.mask_mel(mel, records[0], epoch)
        times += masked_spans(masked, mel, axis=1)
        frequencies += masked_spans(masked, mel, axis=0)
        changed = masked[masked != mel]
        np.testing.assert_allclose(changed, mel.mean(), rtol=1e-5)
    np.testing.assert_array_equal(mel, before)
    # 0.15 of 120 frames is less than 0.3 s
    assert {stop - start for start, stop in times} == set(range(1, 19))
    assert {stop - start for start, stop in frequencies} == set(range(1, 10))
    assert min(start for start, _ in times) < 10
    assert max(stop for _, stop in times) > 110
    assert max(stop for _, stop in frequencies) > 76


def test_masks_on_encoder_outputs_are_new_in_each_epoch(records):
    config = AugmentConfig(masks=MaskConfig(time=2, time_width=0.2, time_share=1.0))
    encoded = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).half()
    augmentation = Augmentation(config, records, seed=0)
    masked = [augmentation.mask_encoded(encoded, records[0], epoch) for epoch in range(100)]
    hidden = [(one != encoded).all(dim=1) for one in masked]
    assert len({tuple(one.tolist()) for one in hidden}) > 80
    assert max(int(one.sum()) for one in hidden) in (19, 20)  # twice 0.2 s of 50 frames a second
    widest = masked[int(torch.stack(hidden).sum(dim=1).argmax())]
    rows = widest[(widest != encoded).all(dim=1)]
    mean = encoded.float().mean(dim=0).half()
    torch.testing.assert_close(rows, mean.expand_as(rows), rtol=0, atol=0)
    again = Augmentation(config, records, seed=0).mask_encoded(encoded, records[0], 7)
    torch.testing.assert_close(again, masked[7], rtol=0, atol=0)
    other = Augmentation(config, records, seed=1).mask_encoded(encoded, records[0], 7)
    assert not torch.equal(other, masked[7])


def test_every_copy_is_read_in_turn(records):
    augmentation = Augmentation(EVERYTHING, records, seed=0)
    for record in records:
        copies = [augmentation.copy(record, epoch) for epoch in range(6)]
        assert set(copies[:3]) == {0, 1, 2}
        assert copies[3:] == copies[:3]
    starts = {
        tuple(Augmentation(EVERYTHING, records, seed=seed).copy(r, 0) for r in records)
        for seed in range(5)
    }
    assert len(starts) > 1


def test_a_cache_keeps_clean_clips_and_their_copies_apart(records, model, processor, tmp_path):
    plain = FeatureCache(tmp_path, model, processor)
    assert plain.fill(records[:2]) == 2
    clean = plain.load(records[0])

    augmenter = WaveformAugmenter(EVERYTHING, records)
    cache = FeatureCache(tmp_path, model, processor, augmenter=augmenter)
    assert cache.path(records[0]) == plain.path(records[0])
    assert cache.fill(records[:2], copies=2) == 4  # the clean ones are there
    assert cache.fill(records[:2], copies=3) == 2
    assert cache.fill(records[:2], copies=3) == 0
    torch.testing.assert_close(cache.load(records[0]), clean, rtol=0, atol=0)
    lengths = {len(cache.load(records[0], copy)) for copy in range(4)}
    files = {cache.path(records[0], copy).read_bytes() for copy in range(4)}
    assert len(files) == 4
    assert lengths != {len(clean)}  # at some speed but its own

    # a copy is the encoder's view of the augmented waveform
    waveform, _ = soundfile.read(records[0].audio, dtype="float32")
    heard = augmenter(waveform, clip_id=records[0].id, draw="copy 2")
    batch = processor.pad_features([processor.features(heard)])
    with torch.no_grad():
        hidden, mask = model.encode(batch["input_features"], batch["feature_attention_mask"])
    torch.testing.assert_close(
        cache.load(records[0], 2), hidden[0][mask[0]].half(), rtol=0, atol=2e-3
    )

    other = dataclasses.replace(EVERYTHING, telephone=0.6)
    changed = FeatureCache(tmp_path, model, processor, augmenter=WaveformAugmenter(other, records))
    assert changed.path(records[0]) == cache.path(records[0])
    assert changed.path(records[0], 1) != cache.path(records[0], 1)
    masks_and_count = dataclasses.replace(EVERYTHING, copies=9, masks=MaskConfig())
    kept = FeatureCache(
        tmp_path, model, processor, augmenter=WaveformAugmenter(masks_and_count, records)
    )
    assert kept.path(records[0], 1) == cache.path(records[0], 1)
    with pytest.raises(ValueError, match="there is no augmenter"):
        plain.fill(records, copies=1)


def first_values(dataset, sampler, workers):
    loader = DataLoader(
        dataset, batch_size=2, sampler=sampler, collate_fn=list, num_workers=workers
    )
    return [(clip.turn.input_ids, clip.mel) for batch in loader for clip in batch]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_workers_and_epochs(records, processor):
    augmentation = Augmentation(EVERYTHING, records, seed=0)
    dataset = ClipDataset(records, processor, prompt="{speech}", augmentation=augmentation)
    sampler = LengthGroupedSampler(dataset.lengths(), 2, seed=0)
    sampler.set_epoch(4)
    here = first_values(dataset, sampler, 0)
    assert len(here) == len(records)
    for (ids, mel), (other_ids, other_mel) in zip(
        here, first_values(dataset, sampler, 2), strict=True
    ):
        assert ids == other_ids
        np.testing.assert_array_equal(mel, other_mel)
    earlier = {tuple(ids): mel for ids, mel in here}
    sampler.set_epoch(5)
    for ids, mel in first_values(dataset, sampler, 0):
        assert not np.array_equal(mel, earlier[tuple(ids)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AugmentConfig(copies=0), "copies must be >= 1"),
        (lambda: AugmentConfig(speed=[0.0]), "factors between 0.25 and 4"),
        (lambda: AugmentConfig(speed=["fast"]), "expected numbers, got 'fast'"),
        (lambda: AugmentConfig(telephone=1.5), "between 0 and 1"),
        (lambda: NoiseConfig(snr_db=[20, 5]), r"\[lowest, highest\]"),
        (lambda: NoiseConfig(kinds=["brown"]), "white, pink, babble; got 'brown'"),
        (lambda: NoiseConfig(kinds=[]), "at least one source"),
        (lambda: ReverbConfig(rt60=[0.0, 1.0]), "above 0"),
        (lambda: MaskConfig(time_share=0.0), "time_share"),
        (
            lambda: DataSection(
                cache_features=True, augment=AugmentConfig(masks=MaskConfig(frequency=1))
            ),
            "masks.frequency masks mel features",
        ),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
