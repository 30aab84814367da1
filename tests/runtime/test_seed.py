from vlmsft.runtime.seed import step_seed


def test_each_step_and_rank_has_its_own_seed():
    seeds = {step_seed(seed, step, rank) for seed in (1, 2) for step in range(50) for rank in range(4)}
    assert len(seeds) == 400


def test_same_step_same_seed():
    assert step_seed(1234, 7, 1) == step_seed(1234, 7, 1)
