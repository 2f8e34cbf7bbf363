"""What a round's implicit rewards are measured against (`train.objective.reference`), found before each round.

    fixed   the base model
    round   the policy that drew the round: mostly the one that the learner would publish itself; for a replayed round,
            which another run's policy drew, that one
    ema     a running average R of all published policies P, with the base B, whose rate and anchor are the objective's:
                R_0 = B,    R_v = (1 - anchor) * (rate * R_(v-1) + (1 - rate) * P_v) + anchor * B

`worker.py` asks with `reference_of`, whose answer goes into the round's `training.json`. The average is in the
learner's checkpoints; without one it is taken over the published policies again, to the same bytes. Of adapters the two
factors are averaged, each by itself.
"""

from kto_ray.objectives.reference import Referring
from kto_ray.policies import PolicyStore, digest_of
from kto_ray.records import PolicyRef
from kto_ray.rounds import RoundStore
from kto_ray.train.learner import Learner


def reference_of(
    learner: Learner, store: PolicyStore, rounds: RoundStore, index: int, version: int
) -> PolicyRef | None:
    """The policy against which this round is measured; the learner's reference is it from here on.

    Args:
        version: of the policy that the learner holds.

    Returns:
        Its version and digest; an average has the version of the newest policy in it. None: there is no reference.

    Raises:
        UserError: a policy of which an average must be taken anew has lost its weights.
    """
    needs, objective = learner.objective.needs, learner.objective
    if needs.reference is None:
        return None
    drew = 0 if needs.reference == "fixed" else _who_drew(rounds, index, version)
    if needs.reference == "ema" and drew:
        assert isinstance(objective, Referring)
        running = learner.reference
        if running.version > drew:  # the run was rewound
            running.load_state_dict({})
        while running.version < drew:
            following = running.version + 1
            # The file of the one that the learner holds may be gone.
            own = learner.sampling.tensors() if following == version else None
            policy = own or store.load(store.resolve(following))
            assert policy is not None
            running.follow(policy, objective.reference_rate, objective.reference_anchor)
        learner.policy.refer_to(running.tensors)
        return PolicyRef(running.version, digest_of(running.tensors, learner.policy.metadata()))
    reference = store.resolve(drew if needs.reference == "round" else 0)
    held = 0 < reference.version == version
    learner.policy.refer_to(learner.sampling.tensors() if held else store.load(reference))
    return reference


def _who_drew(rounds: RoundStore, index: int, version: int) -> int:
    """The policy by which a round is measured."""
    round_ = rounds.round(index)
    return version if "replayed_from" in round_.manifest else max(round_.policy_versions())
