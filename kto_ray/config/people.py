"""What the configuration says of people: `label.human`. `people/` goes by it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, SecretStr, model_validator

from kto_ray.identity import Fixed, Free, Noted
from kto_ray.secrets import hide_in_database
from kto_ray.section import Count, InnerShare, Port, Positive, Section, Share

DatabaseUrl = Annotated[
    SecretStr, PlainSerializer(lambda url: hide_in_database(url.get_secret_value()), str, when_used="json")
]


class Overlap(Section):
    """How many people judge an image, and how their answers become one verdict."""

    labels: Fixed[Count] = 1
    """Answers that an image needs; "unsure" is one, a skip is none. Of an application's votes, the least number."""
    share: Fixed[Share] = 1
    """Share of the images that need so many; the others need one. A small share is enough to measure agreement."""
    rule: Fixed[Literal["majority", "unanimous", "share", "latest"]] = "majority"
    """majority: more yes than no, or the reverse, else abstain; unanimous: abstain unless all say the same; share: yes
    if at least `least_yes` of those who say yes or no say yes, else no; latest: the last yes or no."""
    least_yes: Fixed[InnerShare] = 0.5
    """For `rule: share`."""


class Gold(Section):
    """Images with known answers, mixed in unseen, that tell who does not look."""

    file: Free[str | None] = None
    """JSONL of {"image": path of a PNG or JPEG, relative to the file; "prompt", "answer": "desirable" or
    "undesirable"}; None: no gold."""
    share: Free[InnerShare] = 0.1
    """Of the images that a person is shown."""
    limit: Noted[Share] = 0.7
    """Who has a smaller share of them right is shown to the operator as doubtful, ..."""
    least: Noted[Count] = 5
    """... once so many were answered."""
    action: Noted[Literal["show", "exclude"]] = "show"
    """exclude: who is doubtful is excluded at once: the labels leave all rounds that are still open."""


class RouteAll(Section):
    """Every image goes to people."""

    kind: Literal["all"] = "all"


class RouteRandom(Section):
    """A random share goes to people, scorers judge the rest."""

    kind: Literal["random"] = "random"
    share: Fixed[InnerShare] = 0.5
    """Of a round."""


class RouteNearThreshold(Section):
    """The share whose scores lie nearest to the threshold goes to people, scorers judge the rest."""

    kind: Literal["near_threshold"] = "near_threshold"
    share: Fixed[InnerShare] = 0.25
    """Of a round."""


class RouteDisagreement(Section):
    """Images on which the scorers do not vote alike go to people, up to a share; scorers judge the rest."""

    kind: Literal["disagreement"] = "disagreement"
    share: Fixed[Share] = 1
    """At most so large a share of a round."""


Route = Annotated[
    Annotated[RouteAll | RouteRandom | RouteNearThreshold | RouteDisagreement, Field(discriminator="kind")],
    BeforeValidator(lambda value: as_route(value)),
]


def as_route(value: Any) -> Any:
    """A word stands for the route of that kind with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


class Human(Section):
    """People as the labeler, with `label.labeler: human`; most of it holds for an application's users, too, whose votes
    `label.feedback` takes. When a round is sealed without them is `label.deadline_s`."""

    labelers: Free[tuple[str, ...]] = ("me",)
    """Who is given a link when the run starts; `kto-ray labelers add` adds others at any time."""
    database: Fixed[DatabaseUrl | None] = None
    """SQLAlchemy URL, for instance postgresql+psycopg://user:$PASSWORD@host/name, one database a run; None: a SQLite
    file in the run's folder. $NAME is an environment variable of whoever starts the run; a password that stands here
    itself is not kept and has to be given at every start."""
    min_labels: Noted[Count | InnerShare | None] = None
    """A round is sealed as soon as so many of its images are judged, or, below 1, such a share of those that people are
    asked about; None: all of these."""
    on_deadline: Noted[Literal["train", "scorer", "wait"]] = "train"
    """What happens at `label.deadline_s`: train on what came; let scorers judge what people did not; or wait on until
    `min_labels` is reached, saying so."""
    route: Fixed[Route] = RouteAll()
    """Which images people are asked about."""
    overlap: Overlap = Overlap()
    gold: Gold = Gold()
    lease_s: Free[Positive] = 120
    """For so long an image is one person's; then somebody else may have it. An open page extends it."""
    host: Free[str] = "127.0.0.1"
    """Address that the page listens on; another than loopback is for a machine behind a proxy with HTTPS."""
    port: Free[Port] = 8000
    """Port that the page listens on."""
    public_url: Free[str | None] = None
    """What links begin with, for instance https://labels.example.org; None: http://host:port."""
    link_days: Free[Positive] = 30
    """After so many days a link no longer works."""
    requests_per_minute: Free[Count] = 600
    """Of one labeler; more are told to wait."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Human":
        if len(set(self.labelers)) < len(self.labelers):
            raise ValueError(f"labelers {list(self.labelers)} must differ from each other")
        if "operator" in self.labelers:
            raise ValueError("labelers: 'operator' is the name of whoever runs this; choose another")
        return self
