"""What Slurm says of jobs, read from squeue and sacct as Slurm 22.05 prints them."""

from vlmsft.sweeping.slurm import states


def test_states():
    asked = []

    def ask(command):
        asked.append(command)
        if command.startswith("squeue"):
            return "11|RUNNING\n12|PENDING\n13|COMPLETED\n"
        over = [
            "COMPLETED|0:0",
            "FAILED|7:0",
            "CANCELLED by 0|0:15",
            "TIMEOUT|0:0",
            "OUT_OF_MEMORY|0:125",
            "PREEMPTED|0:15",
        ]
        return "".join(f"{job}|{words}\n" for job, words in enumerate(over, 13))

    found = states([str(job) for job in range(11, 20)], ask)
    assert found == {
        "11": ("RUNNING", None),
        "12": ("PENDING", None),
        "13": ("COMPLETED", 0),
        "14": ("FAILED", 7),
        "15": ("CANCELLED", 143),
        "16": ("TIMEOUT", 1),
        "17": ("OUT_OF_MEMORY", 253),
        "18": ("PREEMPTED", 143),
    }
    assert len(asked) == 2 and asked[1].endswith("--jobs=13,14,15,16,17,18,19"), (
        "one question each, whatever the number"
    )


def test_silence_is_no_end():
    assert states(["1", "2"], lambda command: "") == {} and states([], lambda command: 1 / 0) == {}
