"""What a fault costs a run, by what protects it.

Every row is a fault at step 240 of 360 of a language model of 0.2 M parameters (4 layers x 64, 12 sequences of 64
bytes, AdamW, learning rate 3e-3, clipped at 1.0); every column a protection. A cell is the final validation loss in
nats per token, minus that of the undisturbed run of the same seed, at equal optimizer steps: the mean over seeds, and
the largest difference from it. Behind that, for LossSpikeRecovery: steps from the fault to the first action, updates
lost, and extra samples used, each the largest over seeds.

- ``clip 1.0``: nothing but gradient clipping.
- ``6-sigma skip``: OLMo-core's rule, with a branch where the original multiplies by zero (0 x NaN is NaN), and with
  non-finite values kept out of its window (one would disable the original for 128 steps).
- ``ZClip``: z-score clipping with its numbers; like the original it lets a gradient pass that is not finite.
- ``SpikeDetection``: Lightning's, which ends the run.
- ``best x10, weights``: restore the weights of the best loss when it is ten times as bad or NaN, as usually taught.
- ``stabilityguard``: from the package index, where installed; its defaults.

    python benchmarks/faults.py            # three seeds, some forty minutes on two cores
    python benchmarks/faults.py --quick    # one seed, the five faults that tell most, under five minutes
    python benchmarks/faults.py --policies LossSpikeRecovery
"""

import argparse
import math
import statistics
from multiprocessing import get_context

import torch
from fault_peers import installed_peers
from fault_runs import POLICIES, Result, faults_at, run

AT = 240
QUICK_FAULTS = ("none", "NaN loss", "exponent bit", "LR x60, 3 steps", "shuffled labels, 10")
QUICK_POLICIES = ("clip 1.0", "6-sigma skip", "LossSpikeRecovery")


def cell(results: list[Result], undisturbed: list[Result]) -> str:
    """Mean difference and how far seeds are from it; or how it ended."""
    differences = [result.loss - healthy.loss for result, healthy in zip(results, undisturbed, strict=True)]
    stopped = {result.ended for result in results if result.ended}
    if stopped:
        return f"stops: {', '.join(sorted(stopped))}"
    if not all(math.isfinite(difference) for difference in differences):
        return "NaN"
    mean = statistics.fmean(differences)
    return f"{mean:+.3f} ± {max(abs(difference - mean) for difference in differences):.3f}"


def actions_of(results: list[Result], undisturbed: list[Result]) -> str:
    """What recovery did, at worst over the seeds."""
    delays = [result.actions[0][0] - AT for result in results if result.actions]
    skips = max(sum(kind == "skip" for _, kind in result.actions) for result in results)
    rollbacks = max(sum(kind == "rollback" for _, kind in result.actions) for result in results)
    lost = max(result.steps_lost + skips for result in results)
    extra = max(result.samples - healthy.samples for result, healthy in zip(results, undisturbed, strict=True))
    acted = f"{len(delays)} of {len(results)}, after {max(delays)}" if delays else "none"
    return f"{acted} | {skips} | {rollbacks} | {lost} | {extra}"


def one(seed: int, policy: str, fault: str) -> Result:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    return run(seed, (POLICIES | installed_peers())[policy](), faults_at(AT)[fault])


def main() -> None:
    """Run everything and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=[*POLICIES, *installed_peers()])
    arguments = parser.parse_args()
    policies, faults = arguments.policies, [*faults_at(AT)]
    seeds = range(1 if arguments.quick else arguments.seeds)
    if arguments.quick:
        policies, faults = [*QUICK_POLICIES], [*QUICK_FAULTS]
    with get_context("spawn").Pool(2) as pool:
        undisturbed = pool.starmap(one, [(seed, "clip 1.0", "none") for seed in seeds])
        losses = ", ".join(f"{result.loss:.3f}" for result in undisturbed)
        print(f"Undisturbed: {losses} nats per token.\n")
        print(f"| fault | {' | '.join(policies)} | acted | skips | rollbacks | updates lost | extra samples |")
        print(f"|{'---|' * (len(policies) + 6)}", flush=True)
        for fault in faults:
            jobs = [(seed, policy, fault) for policy in policies for seed in seeds]
            results = pool.starmap(one, jobs, chunksize=1)
            found = {policy: results[i * len(seeds) : (i + 1) * len(seeds)] for i, policy in enumerate(policies)}
            row = [cell(found[policy], undisturbed) for policy in policies]
            acted = actions_of(found["LossSpikeRecovery"], undisturbed) if "LossSpikeRecovery" in found else "| | | | "
            print(f"| {fault} | {' | '.join(row)} | {acted} |", flush=True)


if __name__ == "__main__":
    main()
