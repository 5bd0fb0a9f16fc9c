"""What streaming holds in memory: two data sets of generated images, one twenty times the other, and a resumed run.

    python tests/helpers/streaming_memory.py FOLDER 10000 200000

writes both into the folder as parquet shards (about 2.5 kB an image), reads an epoch of each with two workers, reads
the second half of the larger one again as a resumed run does, and prints the peak memory of each process tree.
"""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = dict(batch_size=250, global_batch=250, workers=2, shuffle_buffer=2000)


def generate(folder, count, shard_rows=10_000):
    """Parquet shards of JPEG files, every one different."""
    import datasets
    from pictures import encoded, photo

    distinct = [encoded(photo(64, 64, place), "JPEG", quality=90) for place in range(2000)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    folder.mkdir(parents=True)
    for shard, begin in enumerate(range(0, count, shard_rows)):
        rows = range(begin, min(begin + shard_rows, count))
        # What follows the end of an image is not looked at.
        images = [{"bytes": distinct[row % 2000] + row.to_bytes(8, "big"), "path": None} for row in rows]
        table = datasets.Dataset.from_dict({"image": images, "label": [row % 10 for row in rows]}, features=features)
        table.to_parquet(folder / f"train-{shard:05d}.parquet", batch_size=500)


def both_halves(image, ordinal):
    return image.unfold(2, 32, 32).permute(2, 0, 1, 3)


def read(folder, start, end):
    """Digests of the batches of steps `start` to `end`; end 0: of the epoch."""
    from byol_timm.data import StreamBatches, open_stream

    begin = time.monotonic()
    splits = open_stream(folder)
    steps = end or len(splits.train) // SETTINGS["global_batch"]
    digests, first = [], 0.0
    with StreamBatches(splits.train, splits.bank, cut=both_halves, start_step=start, **SETTINGS) as batches:
        for batch in itertools.islice(batches, steps - start):
            first = first or time.monotonic() - begin
            digests.append(hashlib.sha256(batch.crops.numpy().tobytes() + batch.ordinals.numpy().tobytes()).hexdigest())
    json.dump({"digests": digests, "first": first}, sys.stdout)


def resident(pid):
    """Bytes of memory of a process and of those it started."""
    total = 0
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                total += resident(child)
    except OSError:
        pass
    return total


def measure(folder, start=0, end=0):
    """Digests of batches, seconds until the first, and the peak memory in bytes of the processes that read them."""
    command = [sys.executable, __file__, "read", str(folder), str(start), str(end)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        peak = 0
        os.set_blocking(process.stdout.fileno(), False)
        output = io.BytesIO()
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            output.write(process.stdout.read() or b"")
            time.sleep(0.02)
        output.write(process.stdout.read() or b"")
    assert process.returncode == 0
    answer = json.loads(output.getvalue())
    return answer["digests"], answer["first"], peak


def main(folder, *counts):
    folders = [Path(folder, str(count)) for count in counts]
    for place, count in zip(folders, counts, strict=True):
        if not place.exists():
            generate(place, count)
    results = []
    for place in folders:
        begin = time.monotonic()
        results.append(measure(place))
        seconds = time.monotonic() - begin
        print(f"{place.name} images: {len(results[-1][0])} steps, {seconds:.0f} s, peak {results[-1][2] / 1e6:.0f} MB")
    digests = results[-1][0]
    half = len(digests) // 2 + 1
    rest, first, peak = measure(folders[-1], half)
    print(
        f"resumed at step {half}: first batch after {first:.1f} s, peak {peak / 1e6:.0f} MB, "
        f"same: {rest == digests[half:]}"
    )
    print(f"peaks compared: {results[-1][2] / results[0][2]:.3f}, resumed {peak / results[0][2]:.3f}")


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
