"""The embedded `stories` corpus: a seeded probabilistic story grammar whose entropy is known exactly.

Every text has exactly one derivation, so -ln P of the derivation is the information content of the text and no model
can do better on average. The grammar is data: WORDS and PLOTS below, one rule after the other.

    name: one | 3*two        a choice between whole alternatives, here with weights 1 and 3; indented lines go on
    name = one 3*two         the same for single words
    <rule>  <rule.{x}>       choose from a rule; the second one's name depends on what was settled earlier
    <x=rule>                 choose and remember the words under x
    {x}                      say again what x is; costs nothing
    [x=words]                settle x without saying it
    _  and  /                a space at the edge of an alternative, and a line end

`a` turns into `an` before a vowel. A text can be read back from left to right without looking ahead, because no
alternative of a rule begins like another one; tests/story_parser.py does so and counts the derivations.
"""

import math
import random
import re
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import NamedTuple

WORDS = """
girl = Ada Bella Clara Ivy 2*Lily Luna 2*Mia Nora Rosa Ruby
boy = 2*Ben Carl Eli Felix Finn Jack Leo Noah Oscar 2*Sam
trait = bold 2*brave busy calm careful cheerful chatty clever 2*curious dainty dreamy eager friendly funny gentle happy
  helpful handy hopeful humble jolly joyful 2*kind lively loyal lucky merry modest noble playful polite proud quiet shy
  silly sleepy sweet tender tidy wise witty zany
age = big 2*little 3*old small tall tiny 2*young
job = baker captain clown cook dancer doctor farmer gardener guard painter pilot pirate sailor shepherd singer tailor
coat = big black brown chubby fluffy golden gray little old red small spotted striped tiny white young
animal = bear bunny cat crow deer dog duck fox frog goat hedgehog hen monkey mouse otter owl penguin pig squirrel
  turtle
beasts = bears camels cats dogs dragons ducks foxes horses lions owls penguins ponies swans tigers turtles whales
color = amber beige black 2*blue brown copper cream crimson golden gray 2*green indigo lilac orange peach pink plaid
  purple 3*red scarlet silver spotted striped teal violet white 2*yellow
look = big bright clean crooked cute dusty fancy glossy heavy huge light little long lovely magic neat new odd old plain
  pretty rare round rusty shiny simple smooth soft square sturdy tiny wide wooden
view = busy charming cozy dusty empty famous grand green hidden leafy lonely lovely mossy muddy noisy old pretty quiet
  shady silent steep tiny wide wild
dwelling = barn cabin cottage farmhouse house hut tent tower wagon windmill
land = bakery bay beach bridge castle cave cliff creek farm field forest garden harbor hill lake library market meadow
  mill museum ocean orchard palace park pond river school sea shop station stream valley village zoo
spot = barrels bench bush cart door fence ferns gate hay hedge ladder log oak rocks shed stairs statue stump table tent
  tree wagon wall window
thing = bell book box candle clock coin crown doll drum flute kettle key lantern map mirror ring
vessel = bottle bowl box bucket cup jar pot sack
bits = acorns beads bottles buttons cards coins crayons feathers gems leaves marbles nails nuts pebbles petals ribbons
  shells spoons
flowers = daffodils daisies lilies orchids pansies poppies roses sunflowers tulips violets
fruit = apples bananas berries cherries figs grapes lemons limes melons olives oranges peaches pears plums
treat = biscuits buns cakes cookies muffins pancakes pies pretzels rolls scones tarts waffles
veg = beans carrots leeks onions peas peppers potatoes pumpkins tomatoes turnips
taste = butter cheese cinnamon cocoa cream flour ginger honey jam milk salt sugar
number = 3*two 3*three 2*four 2*five six seven eight nine ten twelve twenty fifty
weekday = Monday Tuesday Wednesday Thursday Friday 2*Saturday 2*Sunday
month.sun = May June July August
month.rain = April May September October November
month.snow = December January February
month.wind = March April October November
month.fog = February March September October November
adverb = boldly bravely briskly calmly carefully eagerly fondly freely gently gladly happily joyfully kindly lightly
  merrily nicely playfully politely promptly proudly quickly quietly shyly silently slowly softly sweetly swiftly warmly
  wisely
went = crept cycled danced dashed drifted hiked hopped hurried jogged marched raced roamed rode 2*ran rushed skated
  skipped sped strode strolled tiptoed traveled trotted 2*walked wandered
said = called cheered cried giggled hummed laughed 3*said sang shouted smiled whispered
relative = aunt brother cousin 2*father 2*grandma grandpa 2*mother neighbor sister uncle
material = bark clay cloth cotton leather paper silk straw string wax wire wood wool
instrument = drum fiddle flute
virtue = courage friendship helping honesty hope kindness laughter love patience sharing trust wisdom
riches = candy diamonds fame gold honey jewels luck magic money pearls silver speed sugar
cheer = Amazing Bravo Fantastic Hooray Lovely Marvelous Perfect Terrific Wonderful Wow Yippee
"""

PLOTS = """
story: <open> <mood>/<plot>/<close.{end}>

open: 8*Once upon a time<once> | 2*Long ago<once> | 2*Many years ago<once>
  2*There once was <hero> who <habit>.
  3*In a <home> lived <hero>.
  2*Have you heard of <hero> who <habit>?
once: 2*_there was <hero> who <habit>. | 3*_there lived <hero> in a <home>. | 3*, a <trait> <who> <did>.
  2*, in a <home>, there lived <hero>. | , everyone <by> the <view> <land> knew <hero>.
did: <habit> | 2*lived in a <home>
hero: a <trait> <who>
who: 4*girl <named> <girls> | 4*boy <named> <boys> | 2*<job> <named> <anyone>
anyone: <girls> | <boys>
named: 3*named | 2*called
girls: <hero=girl>[he=she][his=her][him=her][friend=her new friend]
boys: <hero=boy>[he=he][his=his][him=him][friend=his new friend]
home: <look> <color> <dwelling> <by> the <land>
by: by | near | beside | behind | next to
habit: 3*loved <hobby> | 2*liked <hobby> | enjoyed <hobby> | dreamed of <hobby> | was good at <hobby>
hobby: <collect> <color> <bits> | <draw> <color> <beasts> | 2*<grow> <plants> | <cook> <treat>
plants: <color> <flowers> | <veg>
collect: collecting | finding | sorting | trading | counting
draw: drawing | painting | feeding | watching
grow: growing | picking | planting | watering
cook: baking | making | tasting | sharing

mood: 5*On a <weather> <weekday> <time>, <setout> | 3*One <weather> <month.{w}> <time>, <setout>
  2*That <weekday> was <weather>, so <setout>
weather: <w.sun>[w=sun] | <w.rain>[w=rain] | <w.snow>[w=snow] | <w.wind>[w=wind] | <w.fog>[w=fog]
w.sun = bright clear fine hot sunny warm
w.rain = damp rainy stormy wet
w.snow = chilly cold frosty icy snowy
w.wind = breezy gusty windy
w.fog = cloudy foggy gray hazy misty
time: 3*morning | 2*afternoon | evening
setout: {he} <puton> {his} <worn> <color> <wear.{w}> and <went> <way>.
puton: 3*put on | pulled on | grabbed | fetched | found | wore
worn = best clean comfy cute fancy favorite new old pretty smart soft tidy
wear.sun = cap sandals shirt shorts sunhat vest
wear.rain = boots cape hood poncho raincoat
wear.snow = coat gloves mittens scarf sweater
wear.wind = bonnet jacket jeans shawl tights
wear.fog = beret cloak hoodie slippers socks
way: to the <place> | toward the <place> | 4*<adverb> to the <place>
place: <land> | 4*<view> <land>

item: <look> <color> <thing=thing>
helper: a <trait> <helping>
helping: 3*<coat> <animal> | <job>
pet: a <trait> <coat> <animal>
worker: a <trait> <age> <job>
where: <under> the <view> <spot>
under: under | near | behind | beside | next to | past
food: <fruit> | <treat> | <veg>
seq: 3*Soon | 2*Then | Later, | Luckily, | Suddenly, | At last
thanks: In return, | As thanks, | Full of joy, | To say thanks,

plot: Then {his} <item> was <gone>. {hero} looked <where> but <spotted> only <number> <bits>. <seq> <helper> <adverb>
    found the {thing} <by> a <look> <color> <vessel>. {hero} <hugged> {friend}.[end=keep]
  There <where> sat <pet>, looking <need>. {hero} <help.{need}>. <thanks> {friend} gave {him} a <item>.[end=keep]
  There, {he} <spotted> a <item> <where>. {hero} asked a <trait> <job> and a <trait> <job>. <seq> <helper> <said>, "My
    {thing}!" and gave {him} <number> <food>.[owner={friend}][end=gave]
  Nearby, a <trait> <age> <job> made <treat>, but the <taste> was gone. {hero} <adverb> fetched more in a <look> <color>
    <thing=vessel>, and <helper> added <number> <fruit>.[end=keep]
  With <number> coins {he} bought seeds for <color> <flowers> from a <trait> <age> <job>. {hero} planted them <where>,
    and <helper> <adverb> watered them.[thing=flowers][end=keep]
  Out of <material> and <material>, {he} <adverb> <built> a <look> <color> <craft>. It broke, but <helper> <mended> it
    with <number> <bits>. {hero} <hugged> {friend}, and the {thing} <move.{craft}>.[end=keep]
  It was the birthday of {his} <relative>, so {he} wrapped a <item> in <color> <material>, and <helper> <adverb> added
    <number> <flowers>. "<cheer>! A {thing}!" <said> everyone.[owner=the family][end=gave]
  By chance there was a <sport> contest for a <item>. <seq> <helper> <said>, "<courage>!" So {hero} <adverb> won the
    {thing} and <hugged> {friend}.[end=keep]
  Inside a <look> <color> <vessel> {he} found a map. It led {him} <past> the <land> to a <view> <spot>. There {hero} dug
    up a <item> and <adverb> shared <number> <color> <bits> with <helper>.[end=keep]
  That day <worker> gave {him} a <look> <color> <thing=instrument>. The {thing} sounded like a <trait> <animal>, but
    {hero} practiced <adverb>. Soon even <number> <color> <beasts> danced.[end=keep]
  Something began <sound> <where>. {hero} <went> closer <adverb>, holding {his} <item>. It was only <pet>, playing with
    <number> <color> <bits>.[end=keep]
  That week a <trait> <newcomer> moved in <by> the <land>. {friend} missed {fhis} <thing=thing>, so {hero} <adverb> made
    {fhim} a <look> <color> one out of <material>. They played <game> <where>.[owner={friend}][end=gave]
  For lunch {he} put <fruit>, <veg>, and <treat> into a <look> <color> <thing=vessel>. <seq> {hero} saw <helper> <where>
    and <adverb> shared it all with {friend}.[end=keep]
  Half hidden <where> lay a <item>. {hero} <rubbed> the {thing}, and a <trait> <spirit> <adverb> granted {him} a wish:
    <number> <food> for every <trait> <job> <by> the <land>.[end=keep]
  Beside the road stood <worker> with a broken <broken>. {hero} <adverb> fixed it with <number> <color> <bits>. <thanks>
    {friend} gave {him} a <item>.[end=keep]
  A <coat> <bird> brought a letter from <worker> <by> the <view> <land>, who wanted a <item>. {hero} made the {thing}
    out of <material> and <adverb> added <number> <treat>.[owner={friend}][end=gave]
  High up in the <tree>, <pet> was stuck. {hero} <adverb> asked a <trait> <age> <job> for a <look> <color> ladder.
    <thanks> {friend} gave {him} a <item>.[end=keep]
  Soon a race began, and {hero} led. But <where> {he} saw <pet> stuck in <mud> and <adverb> stopped to help. For that, a
    <trait> <age> <job> gave {him} a <item>.[end=keep]
  Once there, {hero} swapped <number> <bits> for <number> <food> with a <trait> <age> <job>. <seq> <helper> wanted them
    and <adverb> offered a <item>. {hero} <hugged> {friend}.[end=keep]
gone = gone lost missing
spotted = spotted found noticed saw
need: 2*hungry[need=food] | 2*cold[need=cold] | lost[need=lost] | 2*thirsty[need=drink] | sad[need=sad]
  bored[need=bored] | tired[need=tired]
help.food: <adverb> shared <number> <food> with {friend}
help.cold: <adverb> wrapped {friend} in a <look> <color> <cover>
help.lost: <adverb> led {friend} <past> the <view> <land> to its home
help.drink: <adverb> brought {friend} a <color> <vessel> of <drink>
help.sad: <adverb> sang {friend} a <trait> song about <number> <color> <beasts>
help.bored: <adverb> taught {friend} to juggle <number> <color> <bits>
help.tired: <adverb> made {friend} a <look> <color> bed of <nest>
cover = cloak coat quilt scarf shawl
drink = cocoa juice milk tea water
nest = feathers grass hay leaves moss petals straw wool
built: built | made | put together
craft: <thing=craft.fly>[craft=fly] | <thing=craft.float>[craft=float] | <thing=craft.roll>[craft=roll]
craft.fly = kite
craft.float = boat
craft.roll = wagon
mended = mended fixed repaired
move.fly: <flew> <adverb> over the <view> <land>
move.float: <sailed> <adverb> across the <view> <water>
move.roll: <rolled> <adverb> to the <view> <land>
flew = flew soared glided
sailed = sailed floated drifted
rolled = rolled rattled rumbled
water = bay creek lake ocean pond river sea stream
sport = baking dancing drawing juggling jumping painting singing skating swimming
courage: You can do it | Never give up | Just have fun | Be brave | Try your best
past = past across around over beyond
sound = buzzing humming rattling rustling squeaking tapping ticking whistling
newcomer: girl <named> <pal=girl>[friend={pal}][fhis=her][fhim=her]
  boy <named> <pal=boy>[friend={pal}][fhis=his][fhim=him]
game = cards catch checkers chess leapfrog pirates tag
hugged = hugged thanked
rubbed = rubbed touched lifted polished shook
spirit = dragon elf fairy genie giant gnome troll wizard
broken = bench boat cart clock door fence gate kettle kite ladder pump stove table wagon window
bird = crow duck goose owl parrot raven robin swan
tree = birch maple oak palm pine willow
mud = grass hay leaves moss mud sand straw

close.keep: 5*<night>, {hero} dreamed of <number> <color> <beasts>, with the {thing} <by> {his} <bed>.
  4*<since>, {hero} kept the {thing} <by> the <shelf>, and {friend} brought <number> <food> every <weekday>.
  3*When the <sky.{w}>, {hero} and {friend} <went> home past the <view> <land> with the {thing}.
  2*Back home, {he} ate <number> <food> and showed {his} <relative> the {thing}.
  2*Whenever {he} saw the {thing}, {hero} knew that <moral>.
close.gave: 5*<night>, {hero} dreamed of {friend}, the {thing}, and <number> <color> <beasts>.
  4*<since>, {owner} kept the {thing} <by> the <shelf> and sent {hero} <number> <food> every <weekday>.
  3*When the <sky.{w}>, {hero} <went> home past the <view> <land>, thinking of the {thing}.
  2*Back home, {he} ate <number> <food> and told {his} <relative> about the {thing}.
  2*Whenever {hero} thought of the {thing}, {he} knew that <moral>.
night: That night | That evening | At bedtime | In bed
since: From then on | Ever since | Since then
bed = bed lamp pillow window books door
shelf = bed clock desk door lamp piano shelf stairs stove table window
sky.sun: sun set | sun sank
sky.rain: rain stopped | rain was over
sky.snow: snow stopped | snow turned <color>
sky.wind: wind stopped | wind was gone
sky.fog: fog lifted | fog was gone
moral: <virtue> <beats> <riches>
beats: is better than | is worth more than | lasts longer than | is brighter than | is sweeter than
"""


@dataclass(frozen=True)
class Story:
    """A text and its information content in nats, -ln P of its only derivation, the story's end included."""

    text: str
    nats: float


class _Step(NamedTuple):
    """One piece of an alternative: `say` words, `repeat` a name, `settle` a name as words, or `pick` from a rule."""

    kind: str
    words: str
    name: str = ""


class _Rule(NamedTuple):
    alternatives: tuple[tuple[_Step, ...], ...]
    bounds: tuple[int, ...]  # running sums of the whole weights


def generate_stories(*, seed: int, target_bytes: int) -> Iterator[Story]:
    """Yield stories until their texts have `target_bytes` bytes of UTF-8 or more; the last one is whole.

    The same seed gives the same stories on every machine: `random()` of the Mersenne Twister is the stream that Python
    promises to keep, and the rest is integer arithmetic.
    """
    rules, uniform = _grammar(), random.Random(seed).random
    total = 0
    while total < target_bytes:
        said: list[str] = []
        nats = _tell(rules, "story", {}, said, uniform)
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", "".join(said))
        total += len(text.encode("utf-8"))
        yield Story(text, nats)


def _tell(
    rules: dict[str, _Rule], name: str, known: dict[str, str], said: list[str], uniform: Callable[[], float]
) -> float:
    """Choose from the rule `name`; add to the `known` names and to the words `said`. Returns -ln P of the choices."""
    alternatives, bounds = rules[name]
    chosen = bisect(bounds, int(uniform() * 2**53) * bounds[-1] >> 53)
    nats = math.log(bounds[-1] / (bounds[chosen] - (bounds[chosen - 1] if chosen else 0)))
    for kind, words, target in alternatives[chosen]:
        if kind == "say":
            said.append(words)
        elif kind == "repeat":
            said.append(known[words])
        elif kind == "settle":
            known[target] = words.format_map(known)
        else:
            start = len(said)
            nats += _tell(rules, words.format_map(known), known, said, uniform)
            if target:
                known[target] = "".join(said[start:])
    return nats


@cache
def _grammar() -> dict[str, _Rule]:
    """Compile WORDS and PLOTS."""
    rules = {}
    for name, sign, body in re.findall(r"^([\w.]+)(:| =)((?:.*\n)(?:  .*\n)*)", WORDS + PLOTS, flags=re.M):
        texts = re.split(r"[|\n]", body.replace("\n    ", " ")) if sign == ":" else body.split()
        weighted = [re.fullmatch(r"(?:(\d+)\*)?(.+)", text.strip()) for text in texts]
        alternatives = tuple(_compile(match[2]) for match in weighted if match)
        rules[name] = _Rule(alternatives, tuple(accumulate(int(match[1] or 1) for match in weighted if match)))
    return rules


def _compile(text: str) -> tuple[_Step, ...]:
    steps = []
    for said, name, rule, again, settled, words in re.findall(
        r"([^<{[]+)|<(?:(\w+)=)?([\w.{}]+)>|\{(\w+)\}|\[(\w+)=([^]]*)\]", text
    ):
        if said:
            steps.append(_Step("say", said.replace("_", " ").replace("/", "\n")))
        elif rule:
            steps.append(_Step("pick", rule, name))
        else:
            steps.append(_Step("repeat", again) if again else _Step("settle", words, settled))
    return tuple(steps)
