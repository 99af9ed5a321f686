"""The words of invented tools. The training and the held-out split share no verb and no thing."""

from __future__ import annotations

from dataclasses import dataclass

from programmable_kv.scenarios.phrasings import Split


@dataclass(frozen=True, slots=True)
class Verb:
    """What a tool does to a thing."""

    name: str
    describe: tuple[str, ...]
    """wordings of the description, with `{a}` for the thing and its state"""
    wants: tuple[str, ...]
    """wordings of requests, with `{the}` for the thing; most avoid the tool's own words"""
    prepares: bool = False
    """whether the tool only looks something up"""


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing that tools act on, with its states and the aspects of it that can be changed."""

    name: str
    also: tuple[str, ...]
    """names of the thing in requests"""
    states: tuple[tuple[str, str], ...] = ()
    """(state in a tool's name, its wording in a request, with `{it}`)"""
    aspects: tuple[tuple[str, str], ...] = ()
    """(aspect in a tool's name, its wording in a request)"""


VERBS: dict[Split, tuple[Verb, ...]] = {
    "train": (
        Verb("cancel", ("Cancel {a}.", "Call off {a} for good."),
             ("call off {the}", "cancel {the}", "stop {the} from going ahead", "do without {the} after all")),
        Verb("create", ("Create {a}.", "Set up a new record for {a}."),
             ("set up {the}", "start {the}", "have {the} made", "open {the}")),
        Verb("extend", ("Extend {a}.", "Prolong {a} by a number of days."),
             ("make {the} last longer", "extend {the}", "get more time on {the}", "keep {the} for another two weeks")),
        Verb("archive", ("Archive {a}.", "Move {a} to the archive."),
             ("put {the} away for the records", "archive {the}", "have {the} stored away")),
        Verb("duplicate", ("Duplicate {a}.", "Make an identical copy of {a}."),
             ("have a second one just like {the}", "copy {the}", "get {the} once more, the same again")),
        Verb("print", ("Print {a}.", "Send {a} to the printer."),
             ("have {the} on paper", "print {the}", "get a paper copy of {the}")),
        Verb("lock", ("Lock {a}.", "Lock {a} against changes."),
             ("make sure nobody can touch {the}", "lock {the}", "freeze {the}")),
        Verb("refund", ("Refund {a}.", "Pay back what was paid for {a}."),
             ("get the money back for {the}", "be paid back for {the}", "have {the} refunded")),
        Verb("assign", ("Assign {a} to a person.", "Give {a} to a colleague."),
             ("give {the} to somebody in the team", "have {the} handled by a colleague", "assign {the}")),
        Verb("approve", ("Approve {a}.", "Give {a} the approval it waits for."),
             ("give {the} the go-ahead", "approve {the}", "say yes to {the}")),
        Verb("merge", ("Merge {a} with another one.", "Join {a} and another one."),
             ("join {the} with the other one", "put {the} and the other one together", "merge {the}")),
        Verb("restart", ("Restart {a}.", "Begin {a} again from the start."),
             ("run {the} again from the start", "begin {the} again", "restart {the}")),
        Verb("share", ("Share {a} by link.", "Let others see {a}."),
             ("let a friend see {the}", "share {the}", "show {the} to other people")),
        Verb("delete", ("Delete {a}.", "Remove {a} and all of its data."),
             ("have {the} removed", "delete {the}", "get rid of {the} completely", "erase {the}")),
        Verb("get", ("Get details of {a}.", "Read {a} with all that is known about it."),
             ("know what is in {the}", "see the details of {the}", "look at {the}"), prepares=True),
        Verb("list_all", ("List every {bare}.", "Show all of them: each {bare} there is."),
             ("know how many there are like {the}", "see all that you have of the kind of {the}"), prepares=True),
    ),
    "held_out": (
        Verb("postpone", ("Postpone {a}.",), ("have {the} happen later", "put {the} off", "delay {the}")),
        Verb("replace", ("Replace {a} by another one.",), ("have {the} replaced", "get another one in place of {the}")),
        Verb("withdraw", ("Withdraw {a}.",), ("take back {the}", "pull {the} out")),
        Verb("upgrade", ("Upgrade {a} to a better class.",), ("have {the} in a better class", "get {the} upgraded")),
        Verb("inspect", ("Have {a} inspected.",), ("have somebody check {the} for faults", "have {the} inspected")),
        Verb("insure", ("Insure {a} against loss.",), ("be covered if {the} gets lost", "insure {the}")),
        Verb("fetch", ("Fetch details of {a}.",), ("read about {the}", "learn more about {the}"), prepares=True),
    ),
}  # fmt: skip
CHANGE: dict[Split, tuple[Verb, ...]] = {
    "train": (
        Verb("update", ("Update the {aspect} of {a}.", "Change the {aspect} of {a}."),
             ("have a different {said} for {the}", "change the {said} of {the}", "correct the {said} of {the}",
              "say that {the} has the wrong {said}")),
        Verb("set", ("Set the {aspect} of {a}.", "Choose another {aspect} for {a}."),
             ("choose another {said} for {the}", "have a new {said} on {the}", "change {the} to another {said}")),
    ),
    "held_out": (
        Verb("adjust", ("Adjust the {aspect} of {a}.",),
             ("have the {said} of {the} put right", "switch {the} to another {said}", "get a better {said} for {the}")),
    ),
}  # fmt: skip
THINGS: dict[Split, tuple[Thing, ...]] = {
    "train": (
        Thing("booking", ("reservation", "booking", "stay"),
              (("confirmed", "{it} that was confirmed"), ("tentative", "{it} that is not confirmed yet")),
              (("date", "day"), ("guests", "number of guests"), ("room", "room"))),
        Thing("invoice", ("bill", "invoice", "statement of costs"),
              (("overdue", "{it} that should have been paid by now"), ("paid", "{it} that is settled")),
              (("due_date", "due date"), ("recipient", "name of the recipient"))),
        Thing("ticket", ("ticket", "support case", "complaint"),
              (("open", "{it} that is still open"), ("closed", "{it} that was closed")),
              (("priority", "urgency"), ("category", "category"))),
        Thing("shipment", ("parcel", "shipment", "package"),
              (("lost", "{it} that never arrived"), ("queued", "{it} that has not left yet")),
              (("carrier", "carrier"), ("weight", "weight"))),
        Thing("appointment", ("appointment", "visit", "slot with the doctor"),
              (("missed", "{it} that was missed"), ("upcoming", "next {it}")),
              (("time", "time of day"), ("place", "place"))),
        Thing("subscription", ("subscription", "monthly plan", "plan"),
              (("expired", "{it} that ran out"), ("running", "current {it}")),
              (("plan", "level"), ("billing_day", "billing day"))),
        Thing("playlist", ("playlist", "list of songs", "music list"),
              (("public", "{it} that everybody can see"), ("private", "{it} that nobody else sees")),
              (("title", "title"), ("cover", "picture"))),
        Thing("report", ("report", "summary for the board", "report"),
              (("draft", "{it} that is not finished"), ("final", "finished {it}")),
              (("format", "file format"), ("period", "period"))),
        Thing("claim", ("insurance claim", "claim", "damage report"),
              (("rejected", "{it} that was turned down"), ("new", "{it} from this morning")),
              (("amount", "amount"), ("witness", "witness"))),
        Thing("meeting", ("meeting", "call with the team", "get-together"),
              (("recurring", "weekly {it}"), ("single", "one-off {it}")),
              (("agenda", "agenda"), ("host", "host"))),
        Thing("loan", ("loan", "credit", "money that was lent"),
              (("active", "{it} that is being paid off"), ("requested", "{it} that was asked for")),
              (("rate", "interest rate"), ("term", "duration"))),
        Thing("profile", ("profile", "personal page", "profile"),
              (("hidden", "{it} that is hidden"), ("visible", "{it} that shows up in searches")),
              (("email", "mail address"), ("photo", "photo"), ("address", "home address"))),
        Thing("device", ("device", "machine", "gadget"),
              (("offline", "{it} that does not respond"), ("paired", "{it} that is connected")),
              (("name", "name"), ("volume", "loudness"))),
        Thing("recipe", ("recipe", "cooking instructions", "dish"),
              (("saved", "{it} that was kept"), ("shared", "{it} that came from a friend")),
              (("servings", "number of servings"), ("language", "language"))),
        Thing("contract", ("contract", "agreement", "contract"),
              (("signed", "{it} that was signed"), ("unsigned", "{it} that nobody signed yet")),
              (("party", "other party"), ("clause", "last clause"))),
        Thing("membership", ("membership", "club card", "membership"),
              (("suspended", "{it} that is on hold"), ("trial", "{it} on trial")),
              (("tier", "level"), ("holder", "name on it"))),
    ),
    "held_out": (
        Thing("flight", ("flight", "plane trip"), (("booked", "{it} that is booked"), ("delayed", "{it} that runs late")),
              (("seat", "seat"), ("meal", "meal"))),
        Thing("prescription", ("prescription", "medicine order"),
              (("unfilled", "{it} that nobody filled yet"), ("filled", "{it} that was handed out")),
              (("dose", "dose"), ("pharmacy", "pharmacy"))),
        Thing("delivery", ("delivery", "grocery run"), (("planned", "{it} that is planned"), ("late", "{it} that is late")),
              (("window", "time window"), ("driver_note", "note for the driver"))),
        Thing("course", ("course", "evening class"),
              (("paid_up", "{it} that is paid for"), ("free", "{it} that costs nothing")),
              (("level", "difficulty"), ("teacher", "teacher"))),
        Thing("warranty", ("warranty", "guarantee"), (("valid", "{it} that still counts"), ("void", "{it} that ended")),
              (("owner", "owner"), ("serial", "serial number"))),
        Thing("rental", ("rental car", "rental"),
              (("reserved", "{it} that is reserved"), ("returned", "{it} that was brought back")),
              (("pickup", "pick-up point"), ("model", "car model"))),
    ),
}  # fmt: skip
FIND: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("find_{x}_by_phone", "Find a {x} by phone number."), ("search_{x}", "Search for a {x} by words."),
        ("count_{x}s", "Count how many {x}s there are."), ("find_{x}_by_number", "Find a {x} by its number."),
        ("compute_fee", "Compute a fee from a price."), ("pass_to_supervisor", "Pass the conversation to a supervisor."),
        ("write_note", "Write down a note for later."), ("check_{x}_history", "Show what happened to a {x} so far."),
    ),
    "held_out": (
        ("locate_{x}", "Locate a {x}."), ("sum_up", "Add numbers."), ("connect_to_clerk", "Connect with a clerk."),
        ("browse_{x}s", "Browse the {x}s on offer."),
    ),
}  # fmt: skip


def held_out_tool_words() -> frozenset[str]:
    """Return the words of the names of held-out tools."""
    names = [verb.name for verb in (*VERBS["held_out"], *CHANGE["held_out"])]
    for thing in THINGS["held_out"]:
        names += [thing.name, *(state for state, _ in thing.states), *(aspect for aspect, _ in thing.aspects)]
    return frozenset(word for name in names for word in name.split("_"))
