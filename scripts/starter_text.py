"""The grammar behind the starter: every sentence that the small base model reads, and the demo data, is made here.

A `Writer` expands templates with a seeded random generator. In a template, `{day}` is a word from the list or rule of
that name, `{day#1}` is the same word each time within one document, `{thing.s}` is its plural, and `(a|b|)` is one of
several wordings. All lists and templates were written for this project; nothing was copied from a corpus.

What is covered: reviews, customer messages, short facts, how-to's, little stories, questions and answers, dialogues.
What is not covered: the world. The facts are few and small, the people and towns are invented.

`document` writes one document for pretraining, `demo_rows` the labelled messages, `chat_rows`, `completion_rows` and
`notes` the other samples. A document is plain text or a list of chat messages.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Messages = list[dict[str, str]]
Document = str | Messages


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def lines(text: str) -> list[str]:
    """The phrases of a block of text, one to a line."""
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


# --------------------------------------------------------------------------------------------------------------------
# Words and small rules
# --------------------------------------------------------------------------------------------------------------------

LEXICON: dict[str, list[str]] = {
    "girl": words(
        "Ada Alma Bea Clara Dora Edith Elsa Emma Fay Flora Greta Hana Hazel Ida Ines Iris Ivy Jana June Kaya Lena"
        " Lily Lotte"
        " Mara Mia Nell Nina Nora Olga Pia Rosa Ruth Sara Selma Tess Uma Vera Wilma Yara Zoe"
    ),
    "boy": words(
        "Abel Adam Ben Bruno Carl Cyril Dan David Elias Emil Felix Finn Fred Georg Hugo Ivan Jack Jakob Jonas Karl"
        " Kurt Leo"
        " Liam Max Milo Noah Oscar Otto Paul Pedro Peter Ralph Rico Sam Simon Theo Tom Victor Will Yusuf"
    ),
    "surname": words(
        "Abbey Barlow Castell Dorn Easton Farley Grove Hartwell Ingham Jessop Kettle Lorne Marsh Norwood Oakes"
        " Penrose"
        " Quill Rowan Stark Tilden Underhill Vance Weller Yates"
    ),
    "town": words(
        "Marnford Eastwick Pellham Oxmoor Tarnby Holloway Brackwell Duncaster Fennmouth Greyport Kelbridge Lowfield"
        " Millhaven Northgate Otterby Quaymouth Ravenhill Saltmarsh Thornley Upwater Westerby Ashcombe"
    ),
    "street": lines("""
        Mill Lane
        Station Road
        Orchard Street
        Bridge Street
        Harbour Road
        Church Lane
        Garden Row
        Castle Hill
        Long Acre
        Market Square
        Willow Way
        Spring Terrace
    """),
    "relative": words(
        "mother father sister brother daughter son aunt uncle grandmother grandfather cousin niece nephew wife husband"
    ),
    "other": words(
        "neighbour friend colleague flatmate boss teacher landlord partner sister brother mother father son daughter"
    ),
    "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": words("January February March April May June July August September October November December"),
    "season": words("spring summer autumn winter"),
    "time": lines("""
        noon
        midnight
        three o'clock
        four o'clock
        six o'clock
        half past two
        half past seven
        half past nine
        a quarter to five
        a quarter past eight
        ten in the morning
        five in the afternoon
    """),
    "when": lines("""
        this morning
        last night
        yesterday
        on {day}
        last week
        last {day}
        two days ago
        in {month}
        a month ago
        the other day
        at the weekend
        earlier today
        just before lunch
    """),
    "span": lines("""
        two days
        three days
        four days
        a week
        ten days
        a fortnight
        two weeks
        a month
        six weeks
        two months
        half a year
        a few hours
    """),
    "few": words("two three four five six"),
    "count": words("two three four five six seven eight nine ten eleven twelve"),
    "n": [str(number) for number in range(2, 60)],
    "d": words("0 1 2 3 4 5 6 7 8 9"),
    "order": ["{d}{d}{d}{d}", "{d}{d}{d}{d}{d}", "A{d}{d}{d}{d}", "K-{d}{d}{d}"],
    "amount": ["{n} euros", "{n} pounds", "{n}.50", "{n}.99", "{n} dollars", "{n}.20 euros"],
    "colour": words("red blue green yellow black white brown grey purple orange pink silver golden cream"),
    "shape": words("round square flat long short narrow wide oval"),
    "material": words("wood wool cotton leather steel glass clay paper plastic stone silk copper tin rubber"),
    "weather": words("sunny rainy windy cloudy foggy snowy stormy mild frosty warm cold hot damp dry"),
    "room": words("kitchen bathroom bedroom hall attic cellar garage office nursery study pantry porch"),
    "fruit": words("apple pear plum cherry peach lemon orange banana grape melon fig apricot strawberry blackberry"),
    "vegetable": words(
        "carrot onion potato leek cabbage bean pea turnip pumpkin tomato cucumber radish beetroot spinach"
    ),
    "food": words(
        "bread cheese soup rice honey jam butter porridge stew salad omelette pancakes noodles curry pie biscuits toast"
    ),
    "drink": words("tea coffee milk water cocoa juice lemonade cider"),
    "pet": words("dog cat rabbit hamster parrot goldfish tortoise pony kitten puppy"),
    "beast": words(
        "fox bear hare owl mouse crow goat heron hedgehog squirrel badger otter frog duck donkey wolf sparrow beaver"
    ),
    "job": words(
        "baker farmer nurse teacher driver plumber tailor gardener sailor painter carpenter librarian postman"
        " dentist cook"
        " mechanic fisherman musician shepherd builder clerk miller potter vet"
    ),
    "mood": words(
        "happy sad angry tired proud calm nervous curious lonely cheerful worried bored jealous hungry grateful shy"
    ),
    "goodadj": words(
        "lovely bright sturdy soft quick reliable comfortable elegant handy solid light tidy clever smooth quiet"
        " generous"
        " pleasant splendid excellent superb useful simple sharp strong charming"
    ),
    "badadj": words(
        "flimsy dull noisy slow heavy clumsy useless cheap rough weak ugly awkward dirty stiff disappointing poor"
        " dreadful"
        " awful terrible unreliable uncomfortable cramped wobbly faulty"
    ),
    "very": ["very", "really", "quite", "rather", "so", "truly", "surprisingly", ""],
    "often": words("often always usually sometimes rarely never seldom"),
    "slowly": words(
        "slowly quickly quietly carefully gently suddenly happily sadly softly bravely patiently proudly calmly"
    ),
    "place": lines("""
        the park
        the market
        the library
        the station
        the beach
        the harbour
        the museum
        the school
        the forest
        the bakery
        the river
        the bridge
        the castle
        the old mill
        the hospital
        the village hall
        the swimming pool
        the corner shop
        the post office
        the football ground
    """),
    "thingy": words(
        "key coin book button candle ribbon ring letter map whistle basket blanket lantern bottle box bell rope"
        " feather shell"
        " umbrella scarf hat spoon mirror kite ball notebook pencil ticket photograph bag cup"
    ),
    "hobby": lines("""
        painting
        swimming
        knitting
        baking
        fishing
        cycling
        reading
        singing
        dancing
        chess
        gardening
        running
        playing the piano
        collecting stamps
        walking in the hills
        watching birds
    """),
    "greet": [
        "hello",
        "hi",
        "hi there",
        "good morning",
        "good evening",
        "dear team",
        "dear all",
        "good day",
        "hello again",
        "dear sir or madam",
    ],
    "bye": lines("""
        Thank you.
        Thanks.
        Many thanks.
        Kind regards, {girl} {surname}
        Best wishes, {boy} {surname}
        Thanks, {girl}
        Regards, {boy}
        Please write back soon.
        I look forward to your answer.
        Thank you for your help.
        Please let me know.
        Yours, {boy} {surname}
    """),
}

IRREGULAR_PLURALS = dict(
    pair.split("/")
    for pair in words(
        "knife/knives scarf/scarves shelf/shelves wolf/wolves mouse/mice goldfish/goldfish puppy/puppies pony/ponies"
        " story/stories cherry/cherries strawberry/strawberries blackberry/blackberries potato/potatoes tomato/tomatoes"
        " peach/peaches radish/radishes box/boxes fox/foxes watch/watches torch/torches brush/brushes dress/dresses"
        " mattress/mattresses bus/buses battery/batteries postman/postmen fisherman/fishermen leaf/leaves loaf/loaves"
        " sheep/sheep fish/fish salmon/salmon trout/trout spinach/spinach compass/compasses butterfly/butterflies"
    )
)

OPPOSITES = [
    tuple(pair.split("/"))
    for pair in words(
        "hot/cold big/small tall/short light/dark light/heavy wet/dry new/old young/old full/empty open/closed"
        " fast/slow early/late"
        " high/low hard/soft rich/poor loud/quiet clean/dirty happy/sad strong/weak thick/thin wide/narrow near/far"
        " rough/smooth"
        " sharp/blunt sweet/sour deep/shallow safe/dangerous cheap/expensive brave/afraid awake/asleep tidy/messy"
        " simple/complicated"
        " polite/rude public/private right/wrong true/false up/down inside/outside above/below before/after"
        " always/never"
        " day/night summer/winter morning/evening north/south east/west left/right first/last buy/sell push/pull"
        " give/take win/lose"
        " remember/forget arrive/leave begin/end laugh/cry love/hate ask/answer friend/enemy question/answer"
        " entrance/exit"
    )
]

# --------------------------------------------------------------------------------------------------------------------
# Things that people buy, with what can be good or bad about their parts
# --------------------------------------------------------------------------------------------------------------------

THINGS: dict[str, tuple[list[str], list[str]]] = {
    "gadget": (
        words("phone tablet laptop camera speaker radio printer watch keyboard monitor headset scanner router"),
        words("battery screen charger sound microphone cable case buttons menu manual stand"),
    ),
    "kitchen": (
        [
            *words("kettle toaster blender oven fridge mixer grill juicer steamer"),
            "coffee machine",
            "bread maker",
            "rice cooker",
        ],
        words("lid handle switch plug base motor timer light door manual"),
    ),
    "tableware": (
        [*words("knife pan teapot pot wok tray bowl jug"), "lunch box", "salad bowl", "frying pan"],
        words("lid handle base coating finish price weight colour"),
    ),
    "furniture": (
        words("chair desk sofa bed wardrobe stool bookcase cupboard armchair bench dresser sideboard"),
        words("legs drawer seat frame screws paint hinges back finish manual"),
    ),
    "home": (
        words("lamp mattress rug cushion curtain blanket pillow quilt tablecloth carpet"),
        words("cover fabric colour lining stitching seams weight price finish"),
    ),
    "clothes": (
        words("jacket coat shirt dress scarf jumper hat raincoat cardigan skirt waistcoat apron"),
        words("zip sleeves lining pockets collar stitching seams buttons fabric colour"),
    ),
    "luggage": (
        words("backpack suitcase handbag satchel rucksack purse"),
        words("zip lining pockets stitching seams straps fabric colour handle wheels"),
    ),
    "tool": (
        words("drill hammer saw spade mower rake pump axe sander trimmer"),
        words("handle blade motor grip tip bolts weight manual cable"),
    ),
    "outdoors": (
        words("tent torch hose ladder greenhouse barbecue hammock parasol"),
        words("frame bag bolts stand cover manual weight finish"),
    ),
    "wheels": (
        words("bicycle wheelbarrow scooter pram tricycle trolley"),
        words("wheels tyres frame seat chain bolts grip handle brakes"),
    ),
    "book": (
        words("novel cookbook atlas diary album dictionary calendar"),
        words("pages story ending pictures cover price paper print"),
    ),
    "game": (
        [*words("puzzle game doll kite"), "train set", "card game", "toy castle"],
        words("pieces box rules pictures price colour manual finish"),
    ),
    "instrument": (
        words("guitar piano drum violin flute accordion"),
        words("strings sound finish case price stand weight colour"),
    ),
}

GENERIC_GOOD = lines("""
    {is} {very} {goodadj}
    {was} better than I expected
    held up well
    never let me down
    looked as good as new after {span}
    did everything it should
    felt {goodadj} and {goodadj}
    made me smile
""")
GENERIC_BAD = lines("""
    {is} {very} {badadj}
    {was} worse than I expected
    broke after {span}
    let me down from the start
    came loose within {span}
    looked {badadj} from the first day
    felt {badadj} and {badadj}
    {was} scratched when I opened the box
    {is} not what the picture shows
""")

# For each part: what a happy buyer and what an unhappy one says of it. {is} and {was} follow the number of the part.
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "battery": (
        lines("""
            lasted for days
            charged in an hour
            {is} still strong after {span}
            never ran out on a long trip
        """),
        lines("""
            died in a week
            ran out before lunch
            got hot after ten minutes
            stopped charging after {span}
        """),
    ),
    "screen": (
        lines("""
            {is} lovely
            {is} bright and clear
            {is} easy to read in the sun
            {is} large enough for two
        """),
        lines("""
            went black after {span}
            flickered all the time
            cracked on the first day
            {is} too dark to read
        """),
    ),
    "charger": (
        ["worked at once", "{is} small enough for my pocket"],
        ["did not fit the socket", "burned out within {span}"],
    ),
    "sound": (["filled the whole room", "{is} rich and warm"], ["{is} thin and tinny", "crackled at low volume"]),
    "microphone": (
        ["picked up every word", "{is} clear even in the wind"],
        ["made my voice sound far away", "cut out every minute"],
    ),
    "cable": (["{is} long and flexible", "reached the far wall"], ["{is} far too short", "frayed at one end"]),
    "case": (["survived a fall", "{is} slim but tough"], ["cracked when I dropped it once", "{is} slippery"]),
    "buttons": (["{is} large and easy to find", "stayed on tight"], ["stuck from the start", "fell off in the wash"]),
    "menu": (["{is} simple to follow", "explained itself"], ["{is} a maze", "forgot my settings every night"]),
    "manual": (
        ["answered all my questions", "{is} short and clear"],
        ["{is} impossible to understand", "{was} missing"],
    ),
    "stand": (["kept it steady", "folded flat"], ["wobbled at every touch", "tipped over twice"]),
    "lid": (["closed tight", "never leaked a drop"], ["did not close", "leaked all over my bag"]),
    "handle": (["stayed cool", "{is} comfortable to hold"], ["snapped off in my hand", "got too hot to touch"]),
    "switch": (["clicked firmly", "{is} easy to reach"], ["jammed after {span}", "{is} in a silly place"]),
    "plug": (
        ["fitted every socket", "{is} neat and small"],
        ["sparked the first time", "{was} the wrong kind for my country"],
    ),
    "blades": (["stayed sharp", "cut through frozen fruit"], ["went blunt within {span}", "rusted after one wash"]),
    "blade": (
        ["stayed sharp for {span}", "cut straight and clean"],
        ["bent on the first branch", "went blunt at once"],
    ),
    "base": (["{is} steady on a wet table", "{is} easy to wipe"], ["scratched my table", "let water in"]),
    "motor": (["ran quietly", "never got tired"], ["smelled of burning", "{is} as loud as a train"]),
    "timer": (["rang right on time", "{is} simple to set"], ["stopped at random", "ran ten minutes slow"]),
    "light": (["{is} soft and warm", "lit the whole path"], ["went out after {span}", "blinked without a reason"]),
    "door": (["opened without a sound", "sealed well"], ["did not shut", "scraped the floor"]),
    "coating": (
        ["let nothing stick", "still looked new after {span}"],
        ["peeled off in flakes", "wore away within {span}"],
    ),
    "legs": (["stood firm on an uneven floor", "{is} solid oak"], ["{is} not the same length", "wobbled"]),
    "drawer": (["slid without a squeak", "held more than I thought"], ["stuck halfway", "fell out when I pulled it"]),
    "seat": (["{is} soft but firm", "{is} wide enough for anyone"], ["sagged within {span}", "{is} as hard as a rock"]),
    "cover": (["washed well", "{is} soft to the touch"], ["tore in the first week", "faded in the sun"]),
    "frame": (
        ["{is} light but strong", "went together in minutes"],
        ["bent under my weight", "squeaked at every move"],
    ),
    "screws": (["fitted the holes", "{was} all there"], ["{was} missing", "turned to dust in the wood"]),
    "fabric": (["{is} soft and thick", "kept its colour in the wash"], ["{is} thin and itchy", "shrank in the wash"]),
    "paint": (["dried to an even shine", "{is} smooth everywhere"], ["chipped within {span}", "smelled for {span}"]),
    "hinges": (["moved freely", "{is} made of good brass"], ["creaked day and night", "rusted through"]),
    "back": (
        ["supported me all day", "{is} just the right height"],
        ["made my shoulders ache", "split along one side"],
    ),
    "finish": (["{is} smooth and even", "shone like glass"], ["came off on my hands", "{is} full of bubbles"]),
    "zip": (["ran like a dream", "never caught once"], ["jammed on the first day", "broke within {span}"]),
    "sleeves": (["{is} just long enough", "rolled up nicely"], ["{is} too short", "came apart at the cuff"]),
    "lining": (["kept me warm in the snow", "{is} silky"], ["ripped within {span}", "bunched up under the arms"]),
    "pockets": (["{is} deep enough for both hands", "kept my things dry"], ["{is} too small for a phone", "had holes"]),
    "collar": (["sat well", "kept the wind out"], ["scratched my neck", "curled up after one wash"]),
    "stitching": (["{is} neat and strong", "held through {span} of use"], ["came undone", "{is} crooked"]),
    "seams": (["{is} neat", "stayed dry in heavy rain"], ["let the rain in", "split within {span}"]),
    "straps": (["{is} wide and padded", "stayed where I set them"], ["cut into my shoulders", "slipped all the time"]),
    "colour": (
        ["{is} even nicer than the picture", "stayed true"],
        ["ran in the wash", "{is} nothing like the picture"],
    ),
    "chain": (
        ["ran smooth and quiet", "needed no oil for {span}"],
        ["slipped off on every hill", "snapped within {span}"],
    ),
    "wheels": (
        ["rolled over roots and stones", "turned without effort"],
        ["jammed with mud", "{is} made of soft plastic"],
    ),
    "grip": (["{is} safe even with wet gloves", "fitted my hand"], ["{is} slippery", "gave me blisters"]),
    "tip": (["{is} hard and precise", "never slipped"], ["wore down in a day", "broke off"]),
    "bolts": (["went in easily", "{is} rust free after {span}"], ["{was} too long", "came loose every day"]),
    "tyres": (["gripped well in the rain", "{is} still like new"], ["went flat twice", "cracked within {span}"]),
    "bag": (["{is} roomy", "kept the water out"], ["smelled of glue", "ripped at the bottom"]),
    "nozzle": (["sprayed far", "{is} easy to turn"], ["dripped all night", "came off under pressure"]),
    "pages": (["{is} thick and smooth", "turned easily for small hands"], ["fell out", "{was} printed upside down"]),
    "story": (["kept me up all night", "surprised me twice"], ["went nowhere", "put me to sleep"]),
    "pieces": (["fitted well", "{is} large enough for children"], ["{was} missing", "did not fit"]),
    "box": (["{is} pretty enough for a gift", "kept everything in order"], ["{was} crushed", "{was} half empty"]),
    "rules": (["{is} easy to learn", "fitted on one page"], ["made no sense", "went on for forty pages"]),
    "ending": (["made me cry", "{is} perfect"], ["came out of nowhere", "spoiled everything"]),
    "pictures": (["{is} full of life", "made my children laugh"], ["{is} blurred", "did not match the text"]),
    "strings": (["kept in tune", "{is} soft on the fingers"], ["snapped one after the other", "buzzed"]),
    "weight": (
        ["{is} just right", "{is} no trouble even for my {relative}"],
        ["{is} twice what the page says", "{is} too much for one person"],
    ),
    "brakes": (["{is} strong and quiet", "stopped me on a steep hill"], ["squealed like a pig", "failed in the rain"]),
    "paper": (
        ["{is} thick and smooth", "took the ink well"],
        ["{is} as thin as a leaf", "turned yellow within {span}"],
    ),
    "print": (["{is} large and clear", "{is} easy on the eyes"], ["{is} tiny", "smudged under my thumb"]),
    "price": (["{was} more than fair", "{is} half of what others ask"], ["{is} far too high", "went up the day after"]),
}

GOOD_VERDICTS = lines("""
    I would buy it again
    I am {very} happy with it
    highly recommended
    worth every penny
    five stars from me
    my {relative} wants one too
    I could not ask for more
    I have no complaints
    a {goodadj} {thing} all round
    it does what it says
    I am glad I chose it
    it was money well spent
    you will not regret it
    I use it every day
    we love it
    not bad at all
    it never disappoints
""")
BAD_VERDICTS = lines("""
    I would not buy it again
    I am {very} unhappy with it
    save your money
    not worth the price
    one star from me
    I sent it back
    I expected better
    do not buy it
    what a waste of money
    it ended up in the bin
    I am not impressed
    I cannot recommend it
    never again
    look for another {thing}
    I regret buying it
    it is not good enough
    nobody needs a {thing} like this
""")
BUY_OPENERS = lines("""
    I bought this {thing} {when}.
    This {thing} was a gift from my {relative}.
    I have had this {thing} for {span}.
    My {relative} chose this {thing} for my birthday.
    We ordered the {colour} {thing} {when}.
    I needed a {thing} for the {room}.
    After {span} with this {thing}, here is what I think.
    I was not sure about this {thing} at first.
    My old {thing} broke, so I tried this one.
    I paid {amount} for this {thing}.
    This is my second {thing} from this maker.
    I read {few} reviews before I ordered this {thing}.
""")
HAPPY_REVIEWS = lines("""
    {opener} {p1}, and {p2}. {good}.
    {opener} {p1}. {p2}. {good}.
    {p1}, {p2}, and {p3}. {good}.
    (Great|Lovely|Superb|Excellent) {thing}. {p1}. {good}!
    Not the cheapest {thing}, but {p1}. {good}.
    I was afraid that it would be {badadj}. I was wrong: {p1}. {good}.
    {opener} Nothing about it is {badadj}. {p1}, and {p2}.
    Some people say that {f1}. That is not true of mine: {p1}. {good}.
    {opener} It is not {badadj} and not {badadj}; {p1}. {good}.
    What I like most is that {p1}. I also like that {p2}. {good}.
    {p1}. Even my {relative}, who never likes anything, says that {p2}.
""")
SAD_REVIEWS = lines("""
    {opener} {f1}, and {f2}. {bad}.
    {opener} {f1}. {f2}. {bad}.
    {f1}, {f2}, and {f3}. {bad}.
    (Poor|Dreadful|Terrible|Disappointing) {thing}. {f1}. {bad}!
    I wanted to like this {thing}. Sadly {f1}. {bad}.
    {opener} Nothing about it is {goodadj}. {f1}, and {f2}.
    The shop says that {p1}. That is not true of mine: {f1}. {bad}.
    It was not {goodadj} and it was not {goodadj}. {f1}. {bad}.
    I cannot say that {p1}. {f1}. {bad}.
    What I like least is that {f1}. It does not help that {f2}. {bad}.
    {opener} Within {span} {f1}. I asked for help and nobody answered. {bad}.
""")
MIXED_HAPPY_REVIEWS = lines("""
    {opener} {f1}, but {p1} and {p2}. {good}.
    {opener} It is true that {f1}. Still, {p1}. {good}.
    Although {f1}, {p1}. {good}.
    {f1}, which is a pity. Everything else is fine: {p1}, and {p2}. {good}.
    At first {f1}. They sent me a new one, and since then {p1}. {good}.
""")
MIXED_SAD_REVIEWS = lines("""
    {opener} {p1}, but {f1}. {bad}.
    {opener} It is true that {p1}. Still, {f1}. {bad}.
    Although {p1}, {f1}. {bad}.
    {p1}, which is nice. That does not help much when {f1}, and {f2}. {bad}.
    At first {p1}. Then {f1}. {bad}.
""")

# --------------------------------------------------------------------------------------------------------------------
# Places where people are served
# --------------------------------------------------------------------------------------------------------------------

SERVICES: dict[str, list[str]] = {
    "hotel": words("staff room bed breakfast view pool lift bathroom"),
    "restaurant": words("waiter soup menu music dessert wine table fish"),
    "cafe": words("coffee cake waiter music terrace tea sandwiches"),
    "barber": words("haircut staff price queue mirror"),
    "garage": words("repair mechanic price queue phone"),
    "museum": words("guide paintings queue shop signs cafe"),
    "campsite": words("showers owner lake view shade bar"),
    "bakery": words("bread rolls cake staff queue smell"),
    "gym": words("trainer machines showers music lockers pool"),
    "station": words("seats clock toilets kiosk heating timetable"),
    "dentist": words("dentist queue nurse price chairs"),
    "bank": words("clerk queue app advice phone fees"),
    "airport": words("crew seats food queue luggage shops"),
    "library": words("staff chairs shelves heating computers"),
    "cinema": words("film seats sound popcorn queue"),
    "clinic": words("doctor nurse queue advice rooms"),
}
SERVICE_GOOD = lines("""
    {is} {very} {goodadj}
    {was} wonderful
    {was} just as we hoped
    could not have been better
    made our day
    {is} the best in {town}
    {was} {goodadj} from start to end
""")
SERVICE_BAD = lines("""
    {is} {very} {badadj}
    {was} a disgrace
    {was} not what we paid for
    could not have been worse
    spoiled our day
    {is} the worst in {town}
    {was} {badadj} from start to end
""")
ASPECTS: dict[str, tuple[list[str], list[str]]] = {
    "staff": (
        ["smiled and remembered our names", "went out of their way to help"],
        ["ignored us for an hour", "{was} rude to my {relative}"],
    ),
    "room": (["{was} clean and bright", "looked out on the sea"], ["smelled of smoke", "{was} next to the lift"]),
    "bed": (["{was} soft and wide"], ["creaked all night", "{was} too short for me"]),
    "breakfast": (["{was} fresh and plentiful"], ["{was} cold", "ran out by eight"]),
    "view": (["took my breath away"], ["{was} a brick wall"]),
    "pool": (["{was} warm and clean"], ["{was} closed for repairs", "{was} green"]),
    "waiter": (
        ["{was} quick and funny", "knew every dish"],
        ["forgot our order twice", "spilled {drink} on my {relative}"],
    ),
    "soup": (["{was} hot and full of flavour"], ["{was} cold and salty"]),
    "food": (["{was} fresh and hot"], ["{was} stale"]),
    "coffee": (["{was} strong and hot"], ["{was} bitter", "tasted of soap"]),
    "cake": (["melted on the tongue"], ["{was} as dry as sand"]),
    "music": (["{was} soft and well chosen"], ["{was} so loud that we could not talk"]),
    "price": (["{was} fair"], ["{was} a shock", "doubled without a warning"]),
    "queue": (["moved fast", "{was} short"], ["went around the corner", "did not move for an hour"]),
    "repair": (["took one hour, as promised"], ["lasted two days and then failed"]),
    "mechanic": (["showed me the old part and explained it"], ["charged me for work he never did"]),
    "seats": (["{was} wide and clean"], ["{was} narrow and torn"]),
    "heating": (["worked well"], ["{was} off in the middle of {month}"]),
    "bread": (["{was} warm from the oven"], ["{was} burnt at the bottom"]),
    "doctor": (["listened to every word"], ["hardly looked up"]),
    "nurse": (["{was} gentle and kind"], ["{was} in a hurry"]),
    "film": (["kept us on the edge of our seats"], ["sent my {relative} to sleep"]),
    "guide": (["told {goodadj} stories"], ["read from a sheet"]),
    "phone": (["{was} answered at once"], ["rang for twenty minutes"]),
    "clerk": (["explained each step"], ["sent me from desk to desk"]),
    "app": (["shows everything at a glance"], ["logs me out every minute"]),
    "advice": (["saved me a lot of money"], ["cost me a lot of money"]),
    "showers": (["{was} hot at any hour"], ["{was} cold every morning"]),
    "luggage": (["came first off the belt"], ["{was} lost for {span}"]),
}
HAPPY_VISITS = lines("""
    We went to the {service} in {town} {when}. {p1}, and {p2}. {again}.
    {p1}. {p2}. If you are ever in {town}, go to this {service}.
    I had heard bad things about this {service}, but {p1}, and {p2}. {again}.
    It rained and the {service} was full, yet {p1}. {again}.
    A {goodadj} {service}. {p1}, {p2}. {again}.
    My {relative} did not want to go, and now talks of nothing else: {p1}. {again}.
    It was not quiet, and {f1}, but {p1} and {p2}. {again}.
""")
SAD_VISITS = lines("""
    We went to the {service} in {town} {when}. {f1}, and {f2}. {noagain}.
    {f1}. {f2}. If you are ever in {town}, stay away from this {service}.
    I had heard good things about this {service}, but {f1}, and {f2}. {noagain}.
    The sun shone and the {service} was empty, yet {f1}. {noagain}.
    A {badadj} {service}. {f1}, {f2}. {noagain}.
    My {relative} wanted to go for weeks, and was sad afterwards: {f1}. {noagain}.
    {p1}, I admit, but {f1} and {f2}. {noagain}.
""")
AGAIN = [
    "We will be back",
    "I can only recommend it",
    "A day to remember",
    "We did not want to leave",
    "I would go again tomorrow",
    "Full marks",
]
NO_AGAIN = [
    "We will not be back",
    "I cannot recommend it",
    "A day to forget",
    "We left early",
    "I would not go again if it were free",
    "No marks",
]

# --------------------------------------------------------------------------------------------------------------------
# Messages to a shop. The desk that must act is the one for what the writer wants now.
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Desk:
    """What people write to one desk of a shop, and what it answers.

    A phrase that starts with `~` stays out of the demo's training rows. One that starts with `!` is in its test rows
    only: the base model has never read it either.
    """

    want: list[str]
    """After "I want to"."""
    now: list[str]
    """A clause: how things stand."""
    please: list[str]
    """After "please"."""
    about: list[str]
    """After "this is about"."""
    past: list[str]
    """A clause: a matter of this kind that is over."""
    trouble: list[str]
    """After "you sorted out": a matter of this kind, as a noun."""
    reply: list[str]
    """What the desk answers."""
    sum_up: list[str]
    """After "the customer": the matter in other words."""


DESKS: dict[str, Desk] = {
    "billing": Desk(
        want=lines("""
            know why I paid twice
            have a copy of the invoice
            change the card I pay with
            understand the charge of {amount}
            pay the bill in two parts
            know why the price went up
            use my discount on this order
            ask about the fee on my bill
            ~settle the invoice by bank transfer
            ~know what {amount} on my statement is for
            ~have the tax number put on the receipt
            !put the sum on my receipt right
            !find out what I owe you
        """),
        now=lines("""
            I was charged twice for the {thing#1}
            the invoice shows {n#1} euros instead of {n#2}
            the discount was not taken off
            there is a fee on my bill that I do not know
            you took {amount} for a {thing} I never ordered
            my card was charged before I said yes
            the price on the bill is higher than the price on the page
            I paid the bill, yet I got a reminder
            ~the till and the receipt do not agree
            ~{amount} left my account without a word from you
            ~the voucher was refused when I came to pay
            !the total does not add up
            !I seem to have paid for somebody else as well
        """),
        please=lines("""
            send me the invoice
            take the fee off my bill
            correct the invoice
            explain the charge
            use the other card next time
            check what I paid
            ~tell me what the {amount} is for
            ~send a receipt for {month}
            !look at the sums again
        """),
        about=lines("""
            the bill
            an invoice
            a charge on my card
            the price
            a payment
            a fee of {amount}
            ~my bank statement
            ~the receipt
            !the sums
        """),
        past=lines("""
            the double charge was paid back
            the invoice was corrected {when}
            the fee was taken off
            the bill is paid
            ~the money question is settled
            ~my new card works
        """),
        trouble=lines("""
            a double charge
            a wrong invoice
            a fee I did not owe
            a bill with two mistakes
            ~a payment that went astray
        """),
        reply=lines("""
            I am sorry about the wrong charge. I will check the payment and correct the invoice.
            I see the two payments. The second one will go back to your card within {few} days.
            I have looked at your bill. The fee was a mistake and I have taken it off.
            I will send you a new invoice with the right sum today.
            Thank you for telling me. The discount of {amount} is now on your bill.
            I can explain the charge: it is for {month}. A copy of the receipt is on its way by email.
            You can change your card on the payment page. The next bill will use the new one.
        """),
        sum_up=lines("""
            has a question about a payment
            wants the bill put right
            does not understand a charge
            was charged the wrong sum
            needs an invoice
        """),
    ),
    "delivery": Desk(
        want=lines("""
            know where my {thing#1} is
            change the delivery address
            know when the driver will come
            have the parcel left with my neighbour
            move the delivery to {day}
            have the box sent to my office
            know if the {thing#1} has left the warehouse
            get the parcel before {day}
            ~follow the van on a map
            ~hear at what time the courier calls
            ~pick the box up at the depot
            !find out who signed for my box
            !learn which lorry it is on
        """),
        now=lines("""
            my {thing#1} has not arrived
            the parcel is {few} days late
            the driver went to the wrong house
            nobody rang the bell and the box went back to the depot
            the box was left in the rain
            I am still waiting for the {thing#1} that I ordered {when}
            only one of my two boxes came
            the tracking number has said the same since {day}
            ~the courier says he called, but I was at home all day
            ~there is no sign of the van
            ~the {thing#1} went to my old address
            !the doorstep is empty and it is past {time}
            !I sat at the window until dark for nothing
        """),
        please=lines("""
            send the parcel to my new address
            tell me when the box will come
            find my parcel
            leave the box with my neighbour
            ask the driver to ring the bell
            deliver it on {day}
            ~tell the courier to try the back door
            ~hold the box at the depot
            !have somebody look for it on the van
        """),
        about=lines("""
            the delivery
            a late parcel
            the driver
            my delivery address
            the box that never came
            the tracking number
            ~the courier
            ~the van
            !the doorstep
        """),
        past=lines("""
            the parcel came in the end
            the driver found the house after all
            the late box arrived {when}
            the {thing#1} was at my neighbour's
            ~the van turned up at last
            ~the lost parcel is here
        """),
        trouble=lines("""
            a late parcel
            a lost box
            a driver who could not find the house
            a wrong delivery address
            ~a courier who never rang
        """),
        reply=lines("""
            I am sorry that your parcel is late. I will ask the driver where it is.
            Your {thing} left the warehouse {when} and should reach you by {day}.
            I have changed the delivery address. The driver will come on {day}.
            The box is at the depot. I will have it brought to you on {day} before {time}.
            The driver could not find your door. He will try again on {day} and ring the bell.
            I will look for the missing box and tell you where it is today.
            The driver will leave the parcel with your neighbour.
        """),
        sum_up=lines("""
            is waiting for a parcel
            wants to know where the box is
            did not get the order
            needs another delivery day
            has a question about the driver
        """),
    ),
    "returns": Desk(
        want=lines("""
            send the {thing#1} back
            swap the {thing#1} for a larger one
            have my money back for the {thing#1}
            get a return label
            exchange the {thing#1}
            return the {thing#1} because it is too small
            have a new {thing#1} instead of the broken one
            give the {thing#1} back
            ~bring the {thing#1} back to the shop
            ~trade the {thing#1} in for the {colour} one
            ~have the damaged {thing#1} replaced
            !hand the {thing#1} in at the counter
            !part with the {thing#1} again
        """),
        now=lines("""
            the {thing#1} is too small
            the {thing#1} came broken
            you sent me the wrong colour
            the {thing#1} does not fit
            the {thing#1} looks nothing like the picture
            the {part} of the {thing#1} broke on the first day
            there is a crack in the {thing#1}
            I got a {thing} although I ordered a {thing#1}
            ~there is a hole in the {thing#1}
            ~the {thing#1} was already used when I opened it
            ~one size up would have been right
            !the {thing#1} is the wrong way round for my {room}
            !half of the {thing#1} is in pieces
        """),
        please=lines("""
            send me a return label
            take the {thing#1} back
            give me my money back
            send me a larger one
            replace the {thing#1}
            tell me how to send it back
            ~collect the broken {thing#1} from my house
            ~swap it for the {colour} one
            !let me have one that is whole
        """),
        about=lines("""
            a return
            a refund
            an exchange
            a broken {thing#1}
            the wrong size
            ~a damaged {thing#1}
            ~a swap
            !a {thing#1} with a hole in it
        """),
        past=lines("""
            the refund reached me
            the larger {thing#1} fits
            you took the broken {thing#1} back {when}
            the exchange went well
            ~the new {thing#1} is whole
            ~the label came and the old one is gone
        """),
        trouble=lines("""
            a broken {thing#1}
            a wrong size
            a refund
            a return
            ~a damaged {thing#1}
        """),
        reply=lines("""
            I am sorry that it does not fit. Here is a return label. Send it back within {n} days.
            I am sorry that it came broken. We will take it back and send you a new {thing}.
            You can send the {thing} back for free, and the refund will follow.
            We will exchange it. Put the {thing} in its box, and stick the label on top.
            Please keep the box. I have sent you a label to return the {thing}.
            We will swap it for a larger one as soon as the old one is back.
            That was our mistake. You get your money back when the {thing} is here.
        """),
        sum_up=lines("""
            wants to send something back
            got a broken {thing}
            would like an exchange
            asks for a refund
            has the wrong size
        """),
    ),
    "technical": Desk(
        want=lines("""
            log in to my account
            reset my password
            get the app to open
            connect the {gadget#1} to the network
            update the app
            make the page load
            stop the error message
            pair the {gadget#1} with my phone
            ~see the pictures on your website again
            ~get past the login page
            ~hear some sound from the app
            !move past the spinning wheel
            !make the thing talk to my network
        """),
        now=lines("""
            the app crashes when I open it
            the page stays blank
            I cannot log in
            the code that you sent me does not work
            the {gadget#1} does not connect
            the website shows an error
            the password is refused
            the app freezes at the second step
            ~the login page goes round in circles
            ~the update stops at {n} percent
            ~the search box finds nothing
            !nothing happens when I press the button on your site
            !the little wheel spins and spins
        """),
        please=lines("""
            reset my password
            fix the app
            help me log in
            tell me what the error means
            send a new code
            tell me how to connect the {gadget#1}
            ~repair the search box
            ~unlock my account
            !get the wheel to stop spinning
        """),
        about=lines("""
            the app
            my password
            the website
            an error message
            the login page
            a code that does not work
            ~the search box
            ~the update
            !the spinning wheel
        """),
        past=lines("""
            the app works again
            I can log in again
            the error is gone
            the {gadget#1} is connected now
            ~the update ran through
            ~the page loads again
        """),
        trouble=lines("""
            a locked account
            a lost password
            an error in the app
            a page that stayed blank
            ~a login that failed
        """),
        reply=lines("""
            I am sorry about the error. Please update the app and try again.
            I have reset your password. You can log in with the code that I sent you.
            Please turn the {gadget} off, wait a minute, and connect it again.
            We know about the error on that page and are working on it.
            Please close the app, open it again, and tell me what it shows.
            Your account was locked. I have opened it, so you can log in now.
            Try another browser, please. The page loads there.
        """),
        sum_up=lines("""
            cannot use the app
            has lost the password
            sees an error on the page
            cannot log in
            needs help with the website
        """),
    ),
    "cancel": Desk(
        want=lines("""
            cancel my plan
            close my account
            stop the monthly box
            end my membership
            leave the club
            cancel the order before it is sent
            stop my subscription in {month}
            cancel today
            ~take my name off the list for good
            ~give up the plan
            ~not renew in {month}
            !bring the whole thing to an end
            !say goodbye to the club
        """),
        now=lines("""
            I no longer need the monthly box
            I am moving abroad and do not need the membership
            the plan was renewed and I do not want it
            we have found another shop, so this is our last month
            I do not use my subscription any more
            I have changed my mind about the order and do not want it
            the club is not for me
            I can no longer afford the plan
            ~I have not opened a monthly box since {month}
            ~{month} shall be my last month with you
            ~the membership runs on although I asked you to end it
            !two clubs are one too many for me
            !my time as a member is over
        """),
        please=lines("""
            cancel my plan
            close my account
            stop the monthly box
            end my membership
            cancel the order
            do not renew the plan
            ~take me off the list
            ~let the subscription run out
            !make this my last month
        """),
        about=lines("""
            ending my plan
            closing my account
            stopping the monthly box
            leaving the club
            a cancellation
            ~the end of my membership
            ~not renewing
            !saying goodbye
        """),
        past=lines("""
            I cancelled my old plan {when}
            the monthly box has stopped
            you closed my second account
            the old membership is over
            ~the plan for my {relative} has ended
            ~my name is off the list
        """),
        trouble=lines("""
            a plan I did not need
            a membership I wanted to end
            an order I had to cancel
            a second account
            ~a subscription that ran on
        """),
        reply=lines("""
            I am sorry to see you go. Your plan ends in {month}.
            I have cancelled the order, and nothing will be sent.
            Your account is closed as of today. You can come back at any time.
            The monthly box has been stopped. This month's box is the last one.
            Your membership will not be renewed. It ends in {month}.
            I have ended the subscription. You will get an email to confirm it.
            We have cancelled it, as you asked. It was good to have you with us.
        """),
        sum_up=lines("""
            wants to stop the plan
            does not need the membership any more
            would like to close the account
            wants to cancel the order
            is leaving the club
        """),
    ),
    "praise": Desk(
        want=lines("""
            thank the driver
            say how pleased I am with the {thing#1}
            tell you how kind your staff were
            say thank you
            tell you that the {thing#1} is wonderful
            praise the woman at your desk
            let you know that I am delighted
            thank you for the quick help
            ~send my compliments to the workshop
            ~say that you made my {relative} very happy
            ~give you a pat on the back
            !take my hat off to all of you
            !pass on a smile
        """),
        now=lines("""
            the {thing#1} is better than I hoped
            your staff were kind and quick
            everything came on time and nothing was broken
            I have never had such good service
            the {thing#1} is perfect and my {relative} loves it
            you have a very good shop
            the man on the phone could not have been nicer
            I am delighted with the {thing#1}
            ~I could not be happier
            ~you made my {relative}'s birthday
            ~the {thing#1} is a joy to use
            !hats off to {girl} at your desk
            !there is nothing at all that I would change
        """),
        please=lines("""
            thank the driver for me
            pass on my thanks
            tell your team that I am delighted
            keep up the good work
            give the staff my thanks
            tell {girl} at the desk that she was wonderful
            ~tell the workshop how much we like the {thing#1}
            ~say well done to the driver
            !raise a glass to your driver
        """),
        about=lines("""
            how happy I am
            the good service
            the kind driver
            how well you helped me
            a word of thanks
            ~a compliment
            ~a job well done
            !a smile on my face
        """),
        past=lines("""
            I was happy with the last order
            your shop used to be wonderful
            I have always liked your shop
            your staff were kind to me last time
            ~I have praised you to all my friends
            ~the first {thing} was lovely
        """),
        trouble=[],
        reply=lines("""
            Thank you for your kind words. I will pass them on to the team.
            How nice to hear that! I will tell the driver.
            Thank you very much. We are glad that you like the {thing}.
            That makes our day. Thank you for writing.
            I am happy that it all went well. Enjoy the {thing}!
            Many thanks for the praise. {girl} at the desk will be pleased.
            Thank you. We look forward to seeing you again.
        """),
        sum_up=lines("""
            is happy and says thank you
            is pleased with the {thing}
            praises the staff
            has only good things to say
            liked the service
        """),
    ),
}
LABELS = sorted(DESKS)

# Frames. B is the matter that counts. A is another matter that is mentioned but not meant: it is denied, settled or
# somebody else's.
PLAIN_FRAMES = lines("""
    {B.now}.
    {B.now}. Please {B.please}.
    I (want|would like) to {B.want}.
    I (want|would like) to {B.want}. {B.now}.
    Please {B.please}.
    (I am writing|this is) about {B.about}. {B.now}.
    Could you please {B.please}? {B.now}.
    {B.now}, so please {B.please}.
    ~It is about {B.about}: I would like to {B.want}.
    ~My {relative} says I should write to you, because {B.now}.
""")
# Not for praise.
ASKING_FRAMES = lines("""
    {B.now}. What can you do?
    ~{B.now}. I have written {few} times already.
    ~How do I {B.want}?
""")
# A is any desk but praise, B any but praise.
DENY_FRAMES = lines("""
    I do not want to {A.want}, I want to {B.want}.
    I do not want to {A.want}. {B.now}.
    {B.now}. I do not want to {A.want}.
    I want to {B.want}, not to {A.want}.
    This is not about {A.about}, it is about {B.about}.
    This is about {B.about}, not about {A.about}. {B.now}.
    I am not writing to {A.want}. {B.now}.
    There is no need to {A.please}. Just {B.please}.
    Do not {A.please}, please. {B.please}.
    Please {B.please}. You need not {A.please}.
    I thought that I had to {A.want}, but in fact I want to {B.want}.
    My {other} wants to {A.want}. I only want to {B.want}.
    ~Instead of asking me to {A.want}, please {B.please}.
    ~You keep telling me how to {A.want}. What I need is to {B.want}.
    ~Before you ask: no, I do not wish to {A.want}. {B.now}.
    ~I would rather {B.want} than {A.want}.
    ~{B.now}. Your colleague told me how to {A.want}, which does not help.
    ~Nobody asked you to {A.please}. I asked you to {B.please}.
    !It has nothing to do with {A.about}; {B.now}.
    !If I wished to {A.want} I would say so. Simply {B.please}.
""")
SETTLED_FRAMES = lines("""
    {A.past}, thank you. Now {B.now}.
    {A.past}, but {B.now}.
    {B.now}. The other thing is fine: {A.past}.
    You sorted out {A.trouble} {when}. Today I want to {B.want}.
    Last time it was {A.trouble}, this time {B.now}.
    {A.past}, so forget about that. {B.now}.
    ~First it was {A.trouble}, and that is over. {B.now}. Please {B.please}.
    ~{B.now}. That is the only matter left, since {A.past}.
    ~It is not {A.trouble} again, {A.past}. It is about {B.about}.
    !{A.past} - good. What is left: {B.now}.
""")
# A is praise: kind words, then the real matter.
KIND_FRAMES = lines("""
    {A.past}, but {B.now}.
    I would love to {A.want}, but {B.now}.
    I wish I could say that {A.now}. {B.now}.
    {B.now}. A pity, because {A.past}.
    {A.past}. Sadly {B.now}. Please {B.please}.
    ~You will not hear me say that {A.now}: {B.now}.
    ~Thank you so much, really. {B.now}. Is that your good service?
    ~{A.past}, and that is why it hurts that {B.now}.
""")
# B is praise: the other matter went well.
THANKS_FRAMES = lines("""
    You sorted out {A.trouble} in one day. {B.now}.
    {A.past}, and I want to {B.want}.
    I do not want to {A.want}. I just want to {B.want}.
    I wrote to you because of {A.trouble}, and you helped at once. {B.now}.
    This is not about {A.about}. {B.now}.
    I was afraid that I would have to {A.want}, but no: {B.now}.
    I wanted to {A.want}. Then you called me, and now {B.now}.
    ~{A.past} within the hour. Please {B.please}.
    ~It is not {A.trouble} this time. {B.now}.
    ~For once I need not {A.want}. {B.now}.
    ~After {A.trouble} last year I expected the worst, but {B.now}.
    !You turned {A.trouble} into a good day. {B.now}.
""")
# Two matters, of which the last word decides.
CHANGED_FRAMES = lines("""
    I wrote {when} that I wanted to {A.want}. I have changed my mind: I want to {B.want}.
    First I meant to {A.want}, now I would rather {B.want}.
    Forget what I said about {A.about}. I want to {B.want}.
    I want to {B.want}. {when} I still wanted to {A.want}, but not any more.
    ~Please {B.please}. What I wrote {when} about {A.about} no longer holds.
    ~I said I would {A.want}. Well, I will {B.want} instead.
""")

OTHER_DESKS: dict[str, list[str]] = {
    "bank": lines("""
        I lost my card {when}. Can you block it?
        > I have blocked the card. A new one will reach you within {few} days.
        How do I open a savings account for my {relative#1}?
        > You can open it at the branch. Please bring your {relative#1} and a passport.
        I sent {amount#1} to {girl#1} by mistake. Can I get it back?
        > I have asked the bank of {girl#1} to send the {amount#1} back.
        My card was swallowed by the machine on {street#1}.
        > Somebody will open the machine on {street#1} tomorrow and send you the card.
        I forgot the number for my card.
        > I will send you a new number by post. Please do not write it on the card.
        When does the branch in {town#1} open on {day#1}?
        > On {day#1} the branch in {town#1} opens at nine o'clock and closes at four.
        I want to borrow {n} thousand euros to buy a car. What does it cost?
        > That depends on the time. Over {few} years it costs about {n} euros a month.
        My salary of {month#1} has not reached my account.
        > I see no payment for {month#1} yet. Please ask your boss when it was sent.
        I am travelling to the coast in {month#1}. Will my card work there?
        > Yes, your card will work in {month#1} as it does at home.
        Can I raise the limit of my card to {amount#1}?
        > The limit is now {amount#1}. You can lower it again in the app.
        Somebody I do not know took {amount#1} from my account.
        > I am sorry. I have blocked the account, and you will get the {amount#1} back.
        I do not need a new card, I need a new number for the old one.
        > I see, no new card then. The new number will come by post.
        Why is my account empty? I was paid {when}.
        > You were paid, but the rent and {amount} for a loan went out on the same day.
    """),
    "travel": lines("""
        Is there a train to {town#1} on {day#1} before {time#1}?
        > Yes, there is a train to {town#1} before {time#1}. Shall I book it for {day#1}?
        I would like to book two seats to {town#1} for {day#1}.
        > Two seats to {town#1} on {day#1}: done. The tickets will come by email.
        Our flight to {town#1} was moved to {day#1}. Do we get a new ticket?
        > Your old ticket to {town#1} is good for {day#1} as well.
        My {colour#1} suitcase did not arrive in {town#1}.
        > I am sorry. I will ask in {town#1} for a {colour#1} suitcase. Where are you staying?
        Does the hotel in {town#1} have a room with a view of the sea?
        > The hotel in {town#1} has one such room left, on the third floor.
        We are {few#1} people and want to spend a week by the lake in {month#1}.
        > There is a house by the lake for {few#1} people, free in {month#1}.
        May I bring my {pet#1} on the ferry?
        > Yes, your {pet#1} travels for free, but it must stay on the lower deck.
        I do not want to fly, I want to go by train.
        > By train, then. It takes {few} hours longer, but you see more.
        How long does the bus from {town#2} to {town#1} take?
        > From {town#2} to {town#1} it takes {few} hours, with one change.
        We missed the boat because the train was late. What now?
        > You can take the next boat. I have told the captain to wait for you.
        I booked for {day#1}, not for {day#2}. Please change it.
        > I am sorry. It is {day#1} now, and no longer {day#2}.
        Is breakfast included in the price?
        > Breakfast is included, lunch is not.
    """),
    "phone": lines("""
        There has been no signal in {town#1} since {day#1}.
        > The mast near {town#1} is being repaired. It should be done by {day}.
        The line is slow every evening after {time#1}.
        > Many people use the line after {time#1}. A faster plan would help.
        I am moving to {street#1} in {month#1}. Can I keep my number?
        > Yes, you can keep your number on {street#1}. I will send a form.
        The red light on the router blinks and I have no internet.
        > Please turn the router off, count to {count}, and turn it on again.
        How much does a call to another country cost?
        > It costs {n} cents a minute, and less after {time}.
        My phone was stolen {when}. Please block the number.
        > I have blocked the number. Nobody can make calls with it now.
        I want to switch to the smaller plan.
        > The smaller plan starts on the first of {month}.
        I do not have a problem with the phone. The problem is the line.
        > So the phone is fine. I will have the line checked on {day}.
    """),
    "landlord": lines("""
        The tap in the {room#1} drips all night.
        > I will send a plumber to look at the tap in the {room#1}.
        The heating in the {room#1} has been cold since {day#1}.
        > Cold since {day#1}? I will call the heating company at once.
        When can I pick up the keys?
        > You can collect the keys from {time} at my office.
        The people upstairs are loud after midnight.
        > I will talk to the people upstairs and ask them to be quiet.
        There is a stain on the ceiling of the {room#1}.
        > Water, I fear. A roofer will look at the {room#1} on {day}.
        May I paint the {room#1} {colour#1}?
        > Yes, a {colour#1} {room#1} is fine, if you paint it white again when you leave.
        I would like to move out at the end of {month#1}.
        > Then please write me a letter with the date in {month#1}.
        The lift has been out of order for {span}.
        > The part for the lift comes on {day}. I am sorry for the stairs.
        I do not want to move out, I only want a smaller rent.
        > I cannot lower the rent, but I will not raise it this year.
    """),
}

# --------------------------------------------------------------------------------------------------------------------
# Facts: small, general and true, or about invented towns
# --------------------------------------------------------------------------------------------------------------------


class Creature(NamedTuple):
    """An animal."""

    name: str
    kind: str
    look: str
    home: str
    food: str
    habit: str


CREATURES = [
    Creature(*row.split("|"))
    for row in lines("""
        heron|bird|tall and grey|near rivers and ponds|fish and frogs|stands still for a long time
        owl|bird|brown with large eyes|in barns and old trees|mice|flies without a sound
        sparrow|bird|small and brown|in towns and gardens|seeds and insects|lives in noisy flocks
        crow|bird|black and clever|in fields and woods|almost anything|can remember faces
        robin|bird|round with a red chest|in gardens and hedges|worms and berries|sings even in winter
        swan|bird|white with a long neck|on lakes and slow rivers|water plants|guards its nest
        duck|bird|plump with a flat bill|on ponds and lakes|weeds and snails|has oil on its feathers
        eagle|bird|large with broad wings|in the mountains|rabbits and fish|sees far
        penguin|bird|black and white|on cold southern coasts|fish|swims well but cannot fly
        swallow|bird|blue with a forked tail|in stables and under roofs|flies|travels south in autumn
        parrot|bird|bright and loud|in warm forests|nuts and fruit|can copy voices
        fox|mammal|red with a thick tail|in woods and at the edge of towns|mice and berries|hunts at night
        badger|mammal|grey with a striped face|in burrows in the woods|worms and roots|sleeps by day
        hedgehog|mammal|small and covered with spines|under hedges and leaves|beetles and slugs|rolls into a ball
        otter|mammal|long and sleek|along clean rivers|fish and crabs|plays in the water
        beaver|mammal|brown with a flat tail|in rivers and streams|bark and leaves|builds dams
        bear|mammal|large and shaggy|in forests and mountains|berries, roots and fish|sleeps through the winter
        wolf|mammal|grey and lean|in forests and plains|deer|lives in packs
        hare|mammal|brown with long ears|in open fields|grass and herbs|runs very fast
        squirrel|mammal|red or grey with a bushy tail|in trees|nuts and acorns|hides food for the winter
        goat|mammal|horned and bearded|on farms and rocky hills|grass and twigs|climbs well
        cow|mammal|large and patient|on farms|grass and hay|gives milk
        sheep|mammal|woolly|on hills and meadows|grass|is shorn in early summer
        horse|mammal|tall and strong|on farms and in stables|hay and oats|can sleep on its feet
        donkey|mammal|grey with long ears|on farms|hay and thistles|carries heavy loads
        bat|mammal|small with thin wings|in caves and attics|moths and flies|hears its way in the dark
        mole|mammal|black with broad paws|under the ground|worms|digs long tunnels
        whale|mammal|huge and grey|in the sea|small shrimps|must come up to breathe
        seal|mammal|round and smooth|on cold coasts|fish|rests on rocks
        camel|mammal|tall with a hump|in dry deserts|thorny plants|can go for days without water
        elephant|mammal|huge with a trunk|in warm grassland|leaves and bark|never leaves its young alone
        salmon|fish|silver and strong|in rivers and the sea|insects and small fish|returns to the river of its birth
        trout|fish|spotted|in cold streams|insects|likes clear water
        shark|fish|large with sharp teeth|in the sea|fish and seals|has no bones
        eel|fish|long and thin|in rivers and the sea|worms and snails|can cross wet grass
        frog|amphibian|green and smooth|near ponds|flies and worms|lays its eggs in water
        toad|amphibian|brown and warty|in damp gardens|slugs and ants|comes out after rain
        snake|reptile|long and without legs|in warm, dry places|mice and eggs|sheds its skin
        lizard|reptile|small and quick|on sunny walls|insects|can lose its tail
        tortoise|reptile|slow with a hard shell|in dry, warm lands|leaves and flowers|may live for a hundred years
        crocodile|reptile|long with strong jaws|in warm rivers|fish and deer|can wait for hours
        bee|insect|small and striped|in hives|nectar|makes honey
        ant|insect|tiny and strong|in nests under the ground|seeds and sugar|carries more than its own weight
        butterfly|insect|light with bright wings|in meadows|nectar|begins its life as a caterpillar
        beetle|insect|hard and shiny|in wood and soil|leaves and rotten wood|hides its wings under a shell
    """)
]


class Tool(NamedTuple):
    """A tool."""

    name: str
    use: str
    made_of: str
    user: str


TOOLS = [
    Tool(*row.split("|"))
    for row in lines("""
        saw|cut wood|steel|carpenter
        hammer|drive nails into wood|steel and wood|builder
        needle|sew cloth|steel|tailor
        oven|bake bread|iron|baker
        plough|turn the soil|steel|farmer
        net|catch fish|rope|fisherman
        brush|put paint on a wall|hair and wood|painter
        spade|dig holes|steel and wood|gardener
        kettle|boil water|steel or copper|cook
        thermometer|measure how warm it is|glass|nurse
        compass|find the way north|brass|sailor
        ladder|reach high places|wood or aluminium|window cleaner
        scissors|cut hair and paper|steel|barber
        wheel|shape pots of clay|stone|potter
        spanner|tighten bolts|steel|mechanic
        chalk|write on a blackboard|soft stone|teacher
        scale|weigh flour and fruit|metal|grocer
        telescope|look at the stars|glass and brass|astronomer
        whisk|beat eggs and cream|wire|cook
        anvil|shape hot iron|iron|blacksmith
        broom|sweep the floor|straw|cleaner
        piano|play music|wood and wire|musician
        pump|bring water up from a well|iron|farmer
        map|find the way|paper|driver
        stethoscope|listen to a heart|rubber and steel|doctor
        rope|tie up a boat|hemp|sailor
    """)
]


class Stuff(NamedTuple):
    """A material or a food."""

    name: str
    source: str
    used_for: str
    nature: str


STUFFS = [
    Stuff(*row.split("|"))
    for row in lines("""
        wool|sheep|jumpers and blankets|warm and soft
        cotton|a plant with white tufts|shirts and sheets|light and cool
        leather|the skin of animals|shoes and belts|tough
        silk|the threads of a caterpillar|scarves and fine dresses|smooth and shiny
        paper|wood|books and letters|thin and easy to fold
        glass|melted sand|windows and bottles|clear but easy to break
        steel|iron and a little coal|bridges and knives|hard and strong
        butter|cream|cakes and toast|soft and fat
        cheese|milk|pies and sandwiches|full of flavour
        flour|ground wheat|bread and cakes|white and fine
        honey|bees|tea and toast|sweet and sticky
        bread|flour, water and yeast|sandwiches|good when it is fresh
        cork|the bark of a tree|stoppers for bottles|light enough to float
        rubber|the sap of a tree|tyres and boots|stretchy and waterproof
        brick|clay|walls and chimneys|heavy and hard
        copper|ore from mines|wire and pans|reddish and easy to bend
        wax|bees|candles|soft when it is warm
        salt|sea water or mines|soup and bread|white and fine
        sugar|beets or canes|cakes and sweets|sweet
        oil|olives|salads and frying|golden and smooth
        chocolate|the beans of a tree|cakes and sweets|dark and sweet
        vinegar|old wine or apples|salads|sour
        wood|trees|tables and houses|light and easy to work
        concrete|sand, stones and cement|bridges and floors|hard when it is dry
        gold|ore from mines and rivers|rings and coins|yellow and heavy
    """)
]

JOBS = [
    tuple(row.split("|"))
    for row in lines("""
        baker|bakes bread and cakes|in a bakery|gets up before dawn
        farmer|grows food and keeps animals|on a farm|works in all kinds of weather
        nurse|looks after people who are ill|in a hospital|often works at night
        teacher|helps children to learn|in a school|marks papers in the evening
        plumber|mends pipes and taps|in people's homes|carries a heavy bag of tools
        tailor|makes and mends clothes|in a small shop|measures everything twice
        gardener|looks after plants|in parks and gardens|knows the names of many flowers
        sailor|works on a ship|at sea|is away from home for weeks
        carpenter|makes things of wood|in a workshop|has sawdust in his hair
        librarian|looks after books|in a library|likes it quiet
        postman|brings letters and parcels|on the street|knows every dog by name
        dentist|looks after teeth|in a surgery|asks people to open wide
        cook|prepares meals|in a kitchen|tastes everything first
        mechanic|repairs cars|in a garage|has oil on his hands
        fisherman|catches fish|on a boat|watches the sky for storms
        shepherd|guards sheep|on the hills|walks many miles a day
        builder|builds houses|on building sites|wears a hard hat
        potter|makes cups and bowls of clay|in a studio|works with wet hands
        vet|treats sick animals|in a practice|is not afraid of dogs
        pilot|flies aeroplanes|in the air|checks everything before the start
        judge|decides who is right|in a court|listens to both sides
        firefighter|puts out fires|in the whole town|slides down a pole
        astronomer|studies the stars|in an observatory|sleeps by day
        blacksmith|shapes hot iron|in a forge|has strong arms
    """)
]

PLANTS = [
    tuple(row.split("|"))
    for row in lines("""
        oak|tree|large and slow to grow|acorns
        birch|tree|slim with white bark|small winged seeds
        pine|tree|evergreen with needles|cones
        willow|tree|fond of wet ground|soft catkins
        chestnut|tree|broad and shady|shiny brown nuts
        apple tree|tree|small and round|apples
        rose|shrub|thorny and sweet to smell|red hips
        lavender|herb|purple and full of scent|food for bees
        mint|herb|fresh and quick to spread|leaves for tea
        tulip|flower|tall and bright in spring|bulbs
        daisy|flower|small and white|seeds for the birds
        sunflower|flower|as tall as a man|seeds full of oil
        wheat|grass|golden when it is ripe|grain for bread
        bamboo|grass|hollow and fast to grow|poles
        bean|vegetable|a climber on a pole|green pods
        potato|vegetable|a plant with white flowers|tubers under the ground
        carrot|vegetable|a plant with feathery leaves|an orange root
        pumpkin|vegetable|a plant that creeps over the ground|huge orange fruit
    """)
]

HOW_TO = [
    (block.split("\n")[0].strip(), block.split("\n")[1].strip(), lines("\n".join(block.split("\n")[2:])))
    for block in """
make a pot of tea
a kettle, a teapot and tea leaves
fill the kettle with fresh water and (bring it to the boil|let it boil)
warm the pot with a little hot water and pour it away
put one spoon of tea leaves into the pot for each person
pour the boiling water over the leaves
wait for (three|four|five) minutes
stir once, pour, and add milk or lemon if you like
===
change a bicycle tyre
two tyre levers, a pump and a new tube
turn the bicycle upside down
loosen the bolts and take the wheel out
push the levers under the edge of the tyre and lift it off
pull out the old tube and check the tyre for thorns or glass
put in the new tube with a little air in it
press the tyre back by hand, and take care not to pinch the tube
pump it up and put the wheel back
===
plant bulbs for spring
bulbs, a spade and some sand
choose a sunny place in (September|October|November)
dig a hole three times as deep as the bulb
put a little sand at the bottom if the soil is wet
set the bulb in the hole with the tip up
cover it with soil and press it down (gently|lightly)
water it once and wait for spring
===
clean a burnt pan
baking soda, water and a soft sponge
let the pan cool down
cover the bottom with water and (two|three) spoons of baking soda
bring it to the boil for ten minutes
pour the water away and let the pan cool
rub the spots with a soft sponge, not with steel wool
rinse and dry the pan
===
boil an egg
an egg, a pot and cold water
take the egg out of the fridge early
lower it into boiling water with a spoon
wait for (four|five|six) minutes for a soft egg, or ten for a hard one
take it out and put it under cold water
tap the shell and peel it from the round end
===
paint a wall
paint, a brush, a roller and tape
move the furniture away and cover the floor
fill the holes and let them dry
sand the wall smooth and wipe off the dust
put tape along the edges
paint the corners with a brush
roll the paint on from the top to the bottom
let it dry and add a second coat
===
hang a picture
a hammer, a nail and a pencil
hold the picture against the wall and mark the top
measure how far the wire hangs below the top
mark the place for the nail a little lower
drive the nail in at a slant
hang the picture and step back to see if it is straight
===
wash a wool jumper
cool water, a basin and mild soap
fill a basin with cool water and a little mild soap
turn the jumper inside out and press it gently under the water
do not rub or wring it
rinse it twice in clear water
roll it in a towel to press the water out
lay it flat to dry, away from the sun
===
bake a simple loaf
flour, water, salt and yeast
mix the flour, the salt and the yeast in a bowl
add warm water and stir until it forms a dough
knead the dough for (eight|ten) minutes
cover it and let it rise for an hour
shape a loaf and let it rest for half an hour
bake it in a hot oven for (thirty|forty) minutes
tap the bottom: if it sounds hollow, the bread is done
===
sew on a button
a needle, thread and a button
thread the needle and tie a knot
push the needle through the cloth from behind
pass it up and down through the holes (four|six) times
wind the thread around under the button
push the needle to the back and tie it off
cut the thread
===
write a letter of complaint
the receipt and a quiet hour
say what you bought, when and where
describe what is wrong in two or three plain sentences
say what you want: a repair, a new one or your money back
name a day by which you expect an answer
keep a copy of the letter
do not send it while you are angry
===
back up your phone
a computer and a cable
connect the phone to the computer with a cable
unlock the phone and choose to share files
make a new folder with the date as its name
copy the pictures and the videos into the folder
open a few of them to see that they are whole
unplug the phone
===
set up a home router
the router and its cables
put the router on a shelf in the middle of the home
plug it in and wait until the light is green
connect your laptop to the network on the label
open the page of the router and change the password
write the new password down and keep it safe
connect the other devices one by one
===
grow tomatoes on a balcony
a large pot, soil and a young plant
choose a large pot with a hole in the bottom
fill it with good soil and set the plant in deep
tie the stem to a stick
water it every morning, but keep the leaves dry
pinch off the side shoots
feed it every (ten|fourteen) days
pick the fruit when it is red all over
===
pack for a weekend trip
a small bag and a list
write a list before you open the wardrobe
choose clothes that go together
roll the clothes instead of folding them
put the shoes at the bottom and fill them with socks
pack the things that you need first on top
weigh the bag in your hand: if it is heavy, take something out
===
light a wood stove
dry wood, paper and matches
open the vent and clear the ash
crush some paper and lay small sticks over it
put two dry logs on top, bark side down
light the paper in two places
close the door almost all the way
add more wood when the logs have caught fire
never leave the fire alone
===
sharpen a kitchen knife
a whetstone and water
soak the stone in water for ten minutes
lay the stone on a wet cloth so that it cannot slip
hold the blade at a low angle
draw it across the stone from heel to tip
do the same (ten|twelve) times on the other side
rinse the knife and test it on a tomato
===
save money each month
a notebook and a bank account
write down what you spend for one month
mark what you did not need
set a sum that you can really spare
move it to another account on the day you are paid
leave it alone
look at the result after a year and be proud
===
get a stain out of a shirt
cold water and soap
act at once, since old stains are stubborn
dab the stain with a clean cloth, and do not rub
rinse it from behind with cold water
put a little soap on it and wait for ten minutes
wash the shirt as usual
check it before you dry it, because heat makes a stain stay
===
find a lost key
patience
stop and think of the last time you had it
look in your coat and in every bag
look in the place where it should be, once more
look on the floor by the door
ask the people you live with
if it is really gone, have the lock changed
===
make vegetable soup
an onion, carrots, potatoes and water
chop the onion and fry it in a little oil
cut the carrots and the potatoes into small pieces
add them to the pot and stir
cover them with water and add salt
let the soup simmer for (twenty|thirty) minutes
taste it, and serve it with bread
===
teach a dog to sit
small treats and a quiet room
hold a treat in front of its nose
raise your hand slowly over its head
say the word once, when it sits down
give it the treat at once
repeat it (five|ten) times, then take a break
do not shout and do not push
===
return a parcel
the box, the label and tape
put everything back into its box
write down the order number
print the label and stick it on top
close the box with tape
bring it to the post office and ask for a receipt
keep the receipt until you have your money
===
prepare for an exam
your notes, a calendar and a desk
count the days that are left
divide the subject into small parts
learn one part each day and explain it aloud
test yourself without looking at the notes
sleep well on the night before
read each question twice
""".strip().split("\n===\n")
]

# --------------------------------------------------------------------------------------------------------------------
# The writer
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A place for a word from a list."""

    key: str
    form: str


@dataclass(frozen=True)
class Choice:
    """One of several wordings."""

    branches: tuple[tuple[str | Slot | Choice, ...], ...]


@cache
def parse(template: str) -> tuple[str | Slot | Choice, ...]:
    """Read a template into text, slots and choices; a template that does not close what it opens is an error."""
    position = 0

    def sequence(inside: bool) -> tuple[str | Slot | Choice, ...]:
        nonlocal position
        nodes: list[str | Slot | Choice] = []
        while position < len(template):
            character = template[position]
            if character == "{":
                end = template.index("}", position)
                key, _, form = template[position + 1 : end].partition(".")
                nodes.append(Slot(key, form))
                position = end + 1
            elif character == "(":
                position += 1
                branches = [sequence(True)]
                while template[position] == "|":
                    position += 1
                    branches.append(sequence(True))
                position += 1
                nodes.append(Choice(tuple(branches)))
            elif inside and character in "|)":
                return tuple(nodes)
            else:
                stop = re.compile(r"[{(|)]" if inside else r"[{(]").search(template, position)
                end = stop.start() if stop else len(template)
                nodes.append(template[position:end])
                position = end
        if inside:
            raise ValueError(f"the template {template!r} opens a choice and does not close it")
        return tuple(nodes)

    return sequence(False)


class Writer:
    """Expands templates; the same seed gives the same text."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)
        self.memory: dict[str, str] = {}

    def begin(self, **given: str) -> None:
        """Start a document: forget what slots stood for, and take these as given."""
        self.memory = dict(given)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.random.random() * len(options))]

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.random.random() < share

    def say(self, template: str, **given: str) -> str:
        """Expand one template and tidy the result."""
        return tidy(self.raw(template, **given))

    def raw(self, template: str, **given: str) -> str:
        """Expand one template without tidying, so that the result can be part of a larger one."""
        if given:
            self.memory.update(given)
        return self._join(parse(template))

    def pick_raw(self, templates: Sequence[str], **given: str) -> str:
        """Expand one of the templates, without tidying."""
        return self.raw(self.pick(templates), **given)

    def _join(self, nodes: tuple[str | Slot | Choice, ...]) -> str:
        return "".join(
            node
            if isinstance(node, str)
            else self._join(self.pick(node.branches))
            if isinstance(node, Choice)
            else self._fill(node)
            for node in nodes
        )

    def _fill(self, slot: Slot) -> str:
        whole = f"{slot.key}.{slot.form}"
        if whole in self.memory:
            return self.memory[whole]
        name, _, tag = slot.key.partition("#")
        text = self.memory.get(slot.key)
        if text is None:
            text = self._join(parse(self.pick(LEXICON[name])))
            if tag:
                self.memory[slot.key] = text
        return plural(text) if slot.form == "s" else text


def plural(noun: str) -> str:
    """The plural of a noun."""
    return IRREGULAR_PLURALS.get(noun, noun + "s")


_AN = re.compile(r"\b([Aa]) (?=(?!(?:us|uni|one|eu))[aeiouAEIO]|hour|honest|8\b|11\b|18\b)")
_START = re.compile(r"((?:^|[.!?]\"?\s+|\n)\"?)([a-z])")


def tidy(text: str) -> str:
    """Set the small things right: spaces, `a` before a vowel, a capital at the start of a sentence."""
    text = re.sub(r" +([,.!?;:])", r"\1", re.sub(r"  +", " ", text)).strip()
    text = re.sub(r"([.!?])\.", r"\1", text)
    text = _AN.sub(r"\1n ", text)
    return _START.sub(lambda match: match.group(1) + match.group(2).upper(), text)


# --------------------------------------------------------------------------------------------------------------------
# Reviews
# --------------------------------------------------------------------------------------------------------------------


def _is_plural(part: str) -> bool:
    return part.endswith("s")


def _claim(writer: Writer, part: str, templates: Sequence[str]) -> str:
    many = _is_plural(part)
    return f"the {part} " + writer.pick_raw(
        templates, **{"is": "are" if many else "is", "was": "were" if many else "was"}
    )


@dataclass(frozen=True)
class Review:
    """A review and what is known about it."""

    text: str
    happy: bool
    thing: str
    liked: str
    """One thing that the writer liked, empty when the text names none."""
    disliked: str


def review(writer: Writer) -> Review:
    """A review of something bought."""
    writer.begin()
    things, parts = THINGS[writer.pick(list(THINGS))]
    writer.memory["thing"] = thing = writer.pick(things)
    chosen = writer.random.sample(parts, 6)
    praises = [_claim(writer, part, PARTS[part][0] if writer.chance(0.75) else GENERIC_GOOD) for part in chosen[:3]]
    faults = [_claim(writer, part, PARTS[part][1] if writer.chance(0.75) else GENERIC_BAD) for part in chosen[3:]]
    happy = writer.chance(0.5)
    if writer.chance(0.5):
        templates = HAPPY_REVIEWS if happy else SAD_REVIEWS
    else:
        templates = MIXED_HAPPY_REVIEWS if happy else MIXED_SAD_REVIEWS
    template = writer.pick(templates)
    text = writer.say(
        template,
        opener=writer.pick_raw(BUY_OPENERS),
        good=writer.pick_raw(GOOD_VERDICTS),
        bad=writer.pick_raw(BAD_VERDICTS),
        **{f"p{number}": claim for number, claim in enumerate(praises, 1)},
        **{f"f{number}": claim for number, claim in enumerate(faults, 1)},
    )
    liked = praises[0] if "{p1}" in template and not ("{p1}" in template and template in SAD_REVIEWS) else ""
    disliked = faults[0] if "{f1}" in template and template not in HAPPY_REVIEWS else ""
    return Review(text, happy, thing, liked, disliked)


def visit(writer: Writer) -> Review:
    """A review of a place."""
    writer.begin()
    service = writer.pick(list(SERVICES))
    chosen = writer.random.sample(SERVICES[service], 4)
    nothing: tuple[list[str], list[str]] = ([], [])
    praises = [_claim(writer, part, ASPECTS.get(part, nothing)[0] or SERVICE_GOOD) for part in chosen[:2]]
    faults = [_claim(writer, part, ASPECTS.get(part, nothing)[1] or SERVICE_BAD) for part in chosen[2:]]
    happy = writer.chance(0.5)
    template = writer.pick(HAPPY_VISITS if happy else SAD_VISITS)
    text = writer.say(
        template,
        service=service,
        again=writer.pick(AGAIN),
        noagain=writer.pick(NO_AGAIN),
        **{f"p{number}": claim for number, claim in enumerate(praises, 1)},
        **{f"f{number}": claim for number, claim in enumerate(faults, 1)},
    )
    return Review(
        text, happy, service, praises[0] if "{p1}" in template else "", faults[0] if "{f1}" in template else ""
    )


def review_document(writer: Writer) -> Document:
    """One or more reviews, or a talk about one."""
    found = review(writer) if writer.chance(0.65) else visit(writer)
    kind = writer.random.random()
    if kind < 0.55:
        return found.text
    if kind < 0.65:
        stars = writer.pick(["four", "five"] if found.happy else ["one", "two"])
        return f"{found.text} {stars.capitalize()} stars."
    if kind < 0.72:
        more = [found.text] + [
            (review(writer) if writer.chance(0.65) else visit(writer)).text for _ in range(writer.pick([1, 2, 3]))
        ]
        return "\n\n".join(more)
    questions: list[tuple[str, str]] = [
        (
            writer.pick(
                ["Is this review good or bad?", "Good or bad?", "Is the writer happy? Answer with good or bad."]
            ),
            "good" if found.happy else "bad",
        ),
        (
            writer.pick(
                [
                    f"Would the writer buy this {found.thing} again?",
                    "Is the writer pleased?",
                    "Does the writer recommend it?",
                ]
            ),
            "Yes." if found.happy else "No.",
        ),
    ]
    if found.liked:
        questions.append((writer.pick(["What did the writer like?", "Name one good thing."]), tidy(found.liked + ".")))
    if found.disliked:
        questions.append(
            (
                writer.pick(["What did the writer not like?", "Name one bad thing.", "What was wrong?"]),
                tidy(found.disliked + "."),
            )
        )
    writer.random.shuffle(questions)
    question, answer = questions[0]
    first = f"{question}\n{found.text}" if writer.chance(0.5) else f"{found.text}\n{question}"
    messages = [_user(first), _assistant(answer)]
    for question, answer in questions[1 : writer.pick([1, 2, 3])]:
        messages += [_user(question), _assistant(answer)]
    return messages


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


# --------------------------------------------------------------------------------------------------------------------
# Messages to a shop
# --------------------------------------------------------------------------------------------------------------------

Allowed = Callable[[str], bool]


def is_known(phrase: str) -> bool:
    """True for what the base model may read: all but the phrases kept for the demo's test rows."""
    return not phrase.startswith("!")


def is_taught(phrase: str) -> bool:
    """True for what the demo's training rows may use."""
    return phrase[0] not in "~!"


@dataclass(frozen=True)
class ShopMessage:
    """A message and the desk that it is for."""

    text: str
    desk: str
    other: str
    """The other matter that is mentioned, empty when there is none."""
    used: tuple[str, ...]
    """The frame and the phrases in it, as they stand in the lists, with their marks."""


def shop_message(
    writer: Writer, allowed: Allowed, desk: str, plain: float = 0.35, things: Sequence[str] = (), noise: float = 0.12
) -> ShopMessage:
    """A message to a shop for one desk. `plain` is the share without a second matter, `noise` that of careless"
    " typing."""
    writer.begin()
    category = writer.pick(list(THINGS))
    thing = writer.pick(things or THINGS[category][0])
    category = next(name for name, (names, _) in THINGS.items() if thing in names)
    memory = {"thing#1": thing, "part": writer.pick([p for p in THINGS[category][1] if not _is_plural(p)])}
    memory["gadget#1"] = thing if category == "gadget" else writer.pick(THINGS["gadget"][0])
    writer.begin(**memory)

    chosen: dict[str, str] = {}

    def phrases(name: str, role: str) -> None:
        entry = DESKS[name]
        for field in ("want", "now", "please", "about", "past", "trouble"):
            options = [phrase for phrase in getattr(entry, field) if allowed(phrase)]
            if options:
                chosen[f"{{{role}.{field}}}"] = phrase = writer.pick(options)
                writer.memory[f"{role}.{field}"] = writer.raw(phrase.lstrip("~!"))

    other = ""
    if writer.chance(plain):
        frames = PLAIN_FRAMES if desk == "praise" else [*PLAIN_FRAMES, *ASKING_FRAMES]
    else:
        if desk != "praise" and writer.chance(0.2):
            other, frames = "praise", KIND_FRAMES
        else:
            other = writer.pick([name for name in LABELS if name not in (desk, "praise")])
            frames = THANKS_FRAMES if desk == "praise" else [*DENY_FRAMES, *SETTLED_FRAMES, *CHANGED_FRAMES]
        phrases(other, "A")
    phrases(desk, "B")
    frame = writer.pick([frame for frame in frames if allowed(frame)])
    text = writer.raw(frame.lstrip("~!"))
    if writer.chance(0.3):
        text = greeted(writer, text)
    if writer.chance(0.15):
        text += writer.raw(" My order number is {order}.")
    if writer.chance(0.3):
        text += " " + writer.pick_raw(LEXICON["bye"])
    text = tidy(text)
    if writer.chance(noise):
        text = careless(writer, text)
    return ShopMessage(text, desk, other, (frame, *(phrase for slot, phrase in chosen.items() if slot in frame)))


def greeted(writer: Writer, text: str) -> str:
    """The text after a greeting, in small letters where the greeting ends with a comma."""
    stop = writer.pick([", ", ", ", ". ", "! "])
    if stop == ", " and text.split()[0] in FIRST_WORDS:
        text = text[0].lower() + text[1:]
    return writer.pick(LEXICON["greet"]) + stop + text


def careless(writer: Writer, text: str) -> str:
    """What a hurried thumb makes of a text."""
    kind = writer.random.random()
    if kind < 0.4:
        return text.lower()
    if kind < 0.6:
        return text.lower().replace(",", "").rstrip(".")
    if kind < 0.7:
        return text.upper()
    letters = list(text)
    for _ in range(writer.pick([1, 1, 2])):
        place = writer.random.randrange(1, len(letters) - 1)
        if letters[place].isalpha() and letters[place + 1].isalpha():
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


FIRST_WORDS = set(
    words(
        "Please This Could My There First You Instead Last Before Forget Do How When Is The It May Can Our We Somebody"
    )
)
SHOP_SYSTEMS = lines("""
    You work at the help desk of a shop. Be kind and short.
    You answer customers of a small shop.
    You are a helpful assistant.
    Help the customer.
    You are the assistant of a shop. Answer in two sentences.
    Be polite and brief.
""")
FOLLOW_UPS: list[tuple[str, str]] = [
    ("Thank you, that helps.", "You are welcome. Have a good day!"),
    ("How long will it take?", "It should take no more than {few} days."),
    ("Can I speak to somebody?", "Of course. Please call us between nine and five."),
    ("I wrote {when} and got no answer.", "I am sorry about that. I will look after it myself now."),
    ("Do you need my order number?", "Yes, please."),
    ("My number is {order#9}.", "Thank you. I have found order {order#9}."),
    ("And what does it cost?", "It costs nothing."),
    ("That is not good enough.", "I understand. I will ask {girl} to call you today."),
    ("Can you send me an email?", "Yes, I will send it to the address we have."),
    ("I am not at home on {day#9}.", "Then we will find another day than {day#9}."),
]


def shop_document(writer: Writer) -> Document:
    """A customer's message alone, answered or talked about; never with the name of a desk as its label."""
    found = shop_message(writer, is_known, writer.pick(LABELS))
    kind = writer.random.random()
    if kind < 0.08:
        return found.text
    if kind < 0.18:
        head = writer.pick(["In short, the customer ", "The customer ", "This customer "])
        return f"{found.text}\n\n" + writer.say(head + _phrase(writer, found.desk, "sum_up") + ".")
    if kind < 0.5:
        return _reading(writer, found)
    reply = _reply(writer, found)
    if kind < 0.6:
        return writer.pick(["Customer: {}\nShop: {}", "Message: {}\nAnswer: {}", "{}\n\n{}"]).format(found.text, reply)
    messages = [_user(found.text), _assistant(reply)]
    for question, answer in writer.random.sample(FOLLOW_UPS, writer.pick([0, 0, 0, 0, 1, 1, 2])):
        messages += [_user(writer.say(question)), _assistant(writer.say(answer))]
    return [_system(writer.pick(SHOP_SYSTEMS)), *messages] if writer.chance(0.3) else messages


def _reply(writer: Writer, found: ShopMessage) -> str:
    """What the desk answers, mostly after it has said what it understood."""
    entry = DESKS[found.desk]
    reply = writer.raw(writer.pick(entry.reply), thing=writer.memory["thing#1"], gadget=writer.memory["gadget#1"])
    kind = writer.random.random()
    if kind < 0.3:
        understood = writer.pick(["you want to", "so you want to", "I see, you want to", "you would like to"])
        understood += f" {_said(writer, found, 'want', SECOND)}. "
    elif kind < 0.5:
        understood = writer.pick(
            ["I see that", "you write that"] + (["how nice that"] if found.desk == "praise" else [])
        )
        understood += f" {_said(writer, found, 'now', SECOND)}. "
    elif kind < 0.7 and found.other and DESKS[found.other].trouble:
        here, there = _said(writer, found, "about", SECOND), _other(writer, found, "about", SECOND)
        understood = writer.pick(
            [f"so it is not about {there}, it is about {here}. ", f"about {here}, not about {there}. "]
        )
    elif kind < 0.7:
        understood = f"this is about {_said(writer, found, 'about', SECOND)}. "
    else:
        understood = ""
    greeting = writer.pick(["hello. ", "dear customer. ", "good morning. ", "hi. "]) if writer.chance(0.15) else ""
    return tidy(greeting + understood + reply)


def _reading(writer: Writer, found: ShopMessage) -> Document:
    """Questions about a message, as two colleagues may ask each other."""
    asked: list[tuple[str, str]] = []
    wants = f"the customer {_phrase(writer, found.desk, 'sum_up')}"
    asked.append((writer.pick(["What does the customer want?", "Sum it up.", "What is it about?"]), wants))
    yes, no = _said(writer, found, "want", THIRD), _other(writer, found, "want", THIRD)
    if writer.chance(0.5):
        asked.append((f"Does the customer want to {yes}?", writer.pick(["yes", f"yes, the customer wants to {yes}"])))
    else:
        asked.append((f"Does the customer want to {no}?", writer.pick(["no", f"no, the customer wants to {yes}"])))
    pair = [_said(writer, found, "about", THIRD), _other(writer, found, "about", THIRD)]
    right = pair[0]
    writer.random.shuffle(pair)
    asked.append((f"Is it about {pair[0]} or about {pair[1]}?", f"about {right}"))
    asked.append((writer.pick(["What should we do?", "What is to be done?"]), _said(writer, found, "please", THIRD)))
    asked.append(
        (writer.pick(["Please answer it.", "Write an answer.", "What do we write back?"]), _reply(writer, found))
    )
    writer.random.shuffle(asked)
    asked = [(question, tidy(answer + ("" if answer[-1] in ".!?" else "."))) for question, answer in asked]
    asked = asked[: writer.pick([1, 2, 2, 3])]
    if writer.chance(0.2):
        return found.text + "\n\n" + "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in asked)
    opening = writer.pick(["A customer writes: {}\n{}", "{}\n{}"]).format(found.text, asked[0][0])
    messages = [_user(opening), _assistant(asked[0][1])]
    for question, answer in asked[1:]:
        messages += [_user(question), _assistant(answer)]
    return messages


def _phrase(writer: Writer, desk: str, field: str) -> str:
    """A phrase of a desk that the base model may read."""
    phrases: list[str] = getattr(DESKS[desk], field)
    template = writer.pick([phrase for phrase in phrases if is_known(phrase)])
    return writer.raw(template.lstrip("~"), thing=writer.memory["thing#1"])


def _said(writer: Writer, found: ShopMessage, field: str, person: Person) -> str:
    """The matter of a message as another person puts it: often in the same words, often in others."""
    own = writer.memory[f"B.{field}"]
    return person.says(own if writer.chance(0.5) else _phrase(writer, found.desk, field))


def _other(writer: Writer, found: ShopMessage, field: str, person: Person) -> str:
    """A matter that the message is not about; the one that it mentions, if there is one."""
    if found.other and writer.chance(0.7):
        return person.says(writer.memory[f"A.{field}"])
    desk = found.other or writer.pick([label for label in LABELS if label != found.desk])
    return person.says(_phrase(writer, desk, field))


@dataclass(frozen=True)
class Person:
    """Turns what a customer says into what somebody else says of the customer."""

    subject: str
    object: str
    possessive: str
    shop: tuple[str, str, str]

    def says(self, text: str) -> str:
        """The text with its pronouns changed."""
        said: list[str] = []
        found = text.split(" ")
        for number, word in enumerate(found):
            before = found[number - 1] if number else ""
            after = found[number + 1] if number + 1 < len(found) else ""
            if word in ("I", "we"):
                said.append(self.subject)
            elif word in ("me", "us"):
                said.append(self.object)
            elif word in ("my", "our"):
                said.append(self.possessive)
            elif word in ("am", "was") and before == "I":
                said.append("are" if word == "am" else "were")
            elif word == "you":
                said.append(self.shop[0] if after in SHOP_VERBS else self.shop[1])
            elif word == "your":
                said.append(self.shop[2])
            else:
                said.append(word)
        return " ".join(said)


SECOND = Person("you", "you", "your", ("we", "us", "our"))
THIRD = Person("they", "them", "their", ("we", "us", "our"))
SHOP_VERBS = set(words("sent took have made closed helped used could sorted turned"))


def desk_document(writer: Writer) -> Document:
    """A message to a bank, a travel desk, a phone company or a landlord, mostly with an answer."""
    writer.begin()
    for tag, names in {"town": LEXICON["town"], "day": LEXICON["day"]}.items():
        writer.memory[f"{tag}#1"], writer.memory[f"{tag}#2"] = writer.random.sample(names, 2)
    block = OTHER_DESKS[writer.pick(list(OTHER_DESKS))]
    place = 2 * int(writer.random.random() * (len(block) // 2))
    asked, answer = block[place], block[place + 1].removeprefix("> ")
    text = writer.raw(asked)
    if writer.chance(0.4):
        text = greeted(writer, text)
    if writer.chance(0.3):
        text += " " + writer.pick_raw(LEXICON["bye"])
    text = tidy(text)
    if writer.chance(0.1):
        text = careless(writer, text)
    if writer.chance(0.2):
        return text
    messages = [_user(text), _assistant(writer.say(answer))]
    for question, answer in writer.random.sample(FOLLOW_UPS, writer.pick([0, 0, 1, 1, 2])):
        messages += [_user(writer.say(question)), _assistant(writer.say(answer))]
    if writer.chance(0.25):
        return "\n".join(
            f"{'Caller' if message['role'] == 'user' else 'Desk'}: {message['content']}" for message in messages
        )
    return messages


BOOKINGS: list[tuple[str, list[tuple[str, str]]]] = [
    (
        "a table for {count#1} on {day#1}",
        [
            ("At what time?", "At {time#1}."),
            ("Inside or outside?", "(Inside|Outside), please."),
            ("Under what name?", "{surname#1}."),
            ("Any allergies?", "No, (none|nothing)."),
        ],
    ),
    (
        "a room for {few#1} nights in {month#1}",
        [
            ("For how many people?", "For {count#1}."),
            ("With breakfast?", "(Yes, please|No, thank you)."),
            ("Under what name?", "{girl#1} {surname#1}."),
            ("On which floor?", "The {place_floor}, if you can."),
        ],
    ),
    (
        "a haircut on {day#1}",
        [
            ("In the morning or in the afternoon?", "In the (morning|afternoon)."),
            ("Who should do it?", "{girl#1}, if she is there."),
            ("What is your name?", "{boy#1} {surname#1}."),
        ],
    ),
    (
        "{few#1} tickets to {town#1}",
        [
            ("For which day?", "For {day#1}."),
            ("One way or return?", "(One way|Return)."),
            ("What is your name?", "{boy#1} {surname#1}."),
            ("By the window?", "(Yes|No), please."),
        ],
    ),
    (
        "an appointment for my {pet#1}",
        [
            ("What is wrong with it?", "It (does not eat|limps|sneezes|scratches itself)."),
            ("Is {day#1} fine?", "Yes, {day#1} is fine."),
            ("What is its name?", "{girl#1}."),
        ],
    ),
]
LEXICON["place_floor"] = ["first", "second", "third", "ground floor", "top floor"]


def booking_document(writer: Writer) -> Document:
    """A booking in several turns, confirmed with what was said."""
    writer.begin()
    what, turns = writer.pick(BOOKINGS)
    chosen = [turn for turn in turns if writer.chance(0.8)]
    messages = [_user(writer.say(writer.pick(["I would like to book ", "Can I have ", "Hello, I need "]) + what + "."))]
    details = []
    for question, answer in chosen:
        asked, told = writer.say(question), writer.say(answer)
        messages += [_assistant(asked), _user(told)]
        details.append(told.rstrip(".").removesuffix(", please"))
    summary = f"Good: {writer.raw(what).replace('my ', 'your ')}. " + " ".join(f"{detail}." for detail in details)
    messages.append(_assistant(tidy(summary + writer.pick([" Is that right?", " See you then!", " Thank you."]))))
    if messages[-1]["content"].endswith("?"):
        messages += [_user("Yes, thank you."), _assistant("You are welcome.")]
    return messages


# --------------------------------------------------------------------------------------------------------------------
# Facts, questions and answers
# --------------------------------------------------------------------------------------------------------------------

Facts = tuple[list[str], list[tuple[str, str]]]
"""Statements about one subject, and questions with their answers."""


def _creature(writer: Writer, c: Creature) -> Facts:
    wrong = writer.pick([kind for kind in ("bird", "mammal", "fish", "insect", "reptile") if kind != c.kind])
    statements = [
        f"the {c.name} is a {c.kind}",
        f"it is {c.look}",
        f"{plural(c.name)} live {c.home}",
        f"it eats {c.food}",
        f"it {c.habit}",
        f"a {c.name} is not a {wrong} but a {c.kind}",
    ]
    questions = [
        (f"What does a {c.name} eat?", f"A {c.name} eats {c.food}."),
        (f"Where do {plural(c.name)} live?", f"They live {c.home}."),
        (f"What kind of animal is a {c.name}?", f"A {c.name} is a {c.kind}."),
        (f"What does a {c.name} look like?", f"It is {c.look}."),
        (f"Name something special about the {c.name}.", f"It {c.habit}."),
    ]
    return statements, questions


def _tool(writer: Writer, t: Tool) -> Facts:
    statements = [
        f"people use a {t.name} to {t.use}",
        f"it is made of {t.made_of}",
        f"a {t.user} needs one every day",
        f"without a {t.name} it is hard to {t.use}",
    ]
    questions = [
        (f"What is a {t.name} for?", f"You use it to {t.use}."),
        (f"Who needs a {t.name}?", f"A {t.user} does."),
        (f"What do you need to {t.use}?", f"You need a {t.name}."),
        (f"What is a {t.name} made of?", f"It is made of {t.made_of}."),
    ]
    return statements, questions


def _stuff(writer: Writer, s: Stuff) -> Facts:
    statements = [
        f"{s.name} comes from {s.source}",
        f"it is {s.nature}",
        f"people use it for {s.used_for}",
        f"there would be no {s.name} without {s.source}",
    ]
    questions = [
        (f"Where does {s.name} come from?", f"It comes from {s.source}."),
        (f"What is {s.name} used for?", f"It is used for {s.used_for}."),
        (f"What is {s.name} like?", f"It is {s.nature}."),
    ]
    return statements, questions


def _job(writer: Writer, job: tuple[str, ...]) -> Facts:
    name, does, where, habit = job
    statements = [f"a {name} {does}", f"a {name} works {where}", f"a {name} {habit}"]
    questions = [
        (f"What does a {name} do?", f"A {name} {does}."),
        (f"Where does a {name} work?", f"A {name} works {where}."),
        (f"Who {does}?", f"A {name}."),
    ]
    return statements, questions


def _plant(writer: Writer, plant: tuple[str, ...]) -> Facts:
    name, kind, look, gives = plant
    statements = [f"the {name} is a {kind}", f"it is {look}", f"it gives us {gives}"]
    questions = [
        (f"What is a {name}?", f"It is a {kind}."),
        (f"What does a {name} give us?", f"It gives us {gives}."),
        (f"What does a {name} look like?", f"It is {look}."),
    ]
    return statements, questions


def _town(writer: Writer) -> Facts:
    """Facts about an invented town, true in this document only: the reader has to look back."""
    town, river = writer.random.sample(LEXICON["town"], 2)
    people = f"{writer.random.randrange(2, 90)},{writer.random.randrange(10)}00"
    day, known, trade = (
        writer.raw("{day}"),
        writer.raw("{food}"),
        writer.pick(["fishing", "glass", "wool", "paper", "cheese", "clocks", "boats", "bricks"]),
    )
    side = writer.pick(["north", "south", "east", "west"])
    statements = [
        f"{town} is a small town on the river {river}",
        f"it has {people} people",
        f"the market is on {day}",
        f"the town is known for its {known}",
        f"most people there used to live from {trade}",
        f"the old mill stands in the {side} of the town",
    ]
    questions = [
        (f"On which day is the market in {town}?", f"It is on {day}."),
        (f"How many people live in {town}?", f"{people} people live there."),
        (f"What is {town} known for?", f"It is known for its {known}."),
        ("Where is the old mill?", f"It is in the {side} of the town."),
        (f"On which river is {town}?", f"It is on the river {river}."),
    ]
    return statements, questions


SUBJECTS: list[Callable[[Writer], Facts]] = [
    lambda w: _creature(w, w.pick(CREATURES)),
    lambda w: _creature(w, w.pick(CREATURES)),
    lambda w: _tool(w, w.pick(TOOLS)),
    lambda w: _stuff(w, w.pick(STUFFS)),
    lambda w: _job(w, w.pick(JOBS)),
    lambda w: _plant(w, w.pick(PLANTS)),
    _town,
    _town,
]


def _sentences(clauses: Sequence[str]) -> str:
    return tidy(". ".join(clauses) + ".")


def fact_document(writer: Writer) -> Document:
    """A note about one subject, or questions about it."""
    writer.begin()
    index = int(writer.random.random() * len(SUBJECTS))
    statements, questions = SUBJECTS[index](writer)
    invented = index >= len(SUBJECTS) - 2
    kept = [clause for number, clause in enumerate(statements) if number == 0 or writer.chance(0.75)]
    note = _sentences(kept)
    writer.random.shuffle(questions)
    kind = writer.random.random()
    if kind < 0.35:
        return note
    if kind < 0.5:
        return (
            note
            + "\n\n"
            + "\n".join(
                f"Question: {tidy(q)}\nAnswer: {tidy(a)}" for q, a in questions[:2] if not invented or _told(a, note)
            )
        )
    shown = [(tidy(q), tidy(a)) for q, a in questions if not invented or _told(a, note)][: writer.pick([1, 2, 3])]
    if not shown:
        return note
    messages = []
    for number, (question, answer) in enumerate(shown):
        text = f"{note}\n{question}" if number == 0 and (invented or kind < 0.75) else question
        messages += [_user(text), _assistant(answer)]
    return (
        [_system(writer.pick(["You are a helpful assistant.", "Answer the question.", "Be brief."])), *messages]
        if kind > 0.85
        else messages
    )


def _told(answer: str, note: str) -> bool:
    """True when the note holds the last word of an answer."""
    return answer.rstrip(".").split()[-1] in note and answer.split()[0].lower() in note.lower().split()


def choice_document(writer: Writer) -> Document:
    """One-word questions: pick a word from a list, opposites, order, counting. Never about a shop's desks."""
    writer.begin()
    system = writer.pick(
        ["Answer with one word.", "Reply with one word only.", "Choose one word.", "One word, please."]
    )
    examples = []
    maker = writer.pick([_topic_choice, _opposite, _order, _colour_of, _kind_of, _odd_one, _whose, _more])
    for _ in range(writer.pick([1, 1, 2, 3, 4])):
        examples.append(maker(writer))
    messages = [message for question, answer in examples for message in (_user(question), _assistant(answer))]
    if writer.chance(0.2):
        return "\n".join(f"{question}\n{answer}" for question, answer in examples)
    return [_system(system), *messages] if writer.chance(0.5) else messages


def _topic_choice(writer: Writer) -> tuple[str, str]:
    topics: list[tuple[str, Callable[[], str]]] = [
        ("animals", lambda: _sentences(writer.random.sample(_creature(writer, writer.pick(CREATURES))[0], 2))),
        ("tools", lambda: _sentences(_tool(writer, writer.pick(TOOLS))[0][:2])),
        ("jobs", lambda: _sentences(_job(writer, writer.pick(JOBS))[0][:2])),
        ("plants", lambda: _sentences(_plant(writer, writer.pick(PLANTS))[0])),
        ("towns", lambda: _sentences(writer.random.sample(_town(writer)[0], 2))),
        ("hotels", lambda: visit(writer).text),
        ("shopping", lambda: review(writer).text),
        ("weather", lambda: writer.say("It was {weather} and {weather} in {town} {when}. {day} will be {weather}.")),
        ("cooking", lambda: tidy(" ".join(step + "." for step in _steps(writer, "soup"))) or ""),
    ]
    chosen = writer.random.sample(topics, writer.pick([3, 4, 5, 6]))
    name, make = chosen[0]
    names = sorted(topic for topic, _ in chosen)
    options = ", ".join(names)
    head = writer.pick([f"Topics: {options}.", f"Which one is it: {options}?", f"Choose one of: {options}."])
    return f"{head}\n{make()}", name


def _opposite(writer: Writer) -> tuple[str, str]:
    one, other = writer.pick(OPPOSITES)
    if writer.chance(0.5):
        one, other = other, one
    return writer.pick(["What is the opposite of {}?", "{} is the opposite of what?", "Not {} but?"]).format(one), other


def _order(writer: Writer) -> tuple[str, str]:
    row = LEXICON[writer.pick(["day", "month", "season", "count"])]
    place = int(writer.random.random() * (len(row) - 1))
    if writer.chance(0.5):
        return f"What comes after {row[place]}?", row[place + 1]
    return f"What comes before {row[place + 1]}?", row[place]


def _colour_of(writer: Writer) -> tuple[str, str]:
    things = writer.random.sample(LEXICON["thingy"], 3)
    colours = writer.random.sample(LEXICON["colour"], 3)
    clauses = [f"the {thing} is {colour}" for thing, colour in zip(things, colours, strict=True)]
    which = int(writer.random.random() * 3)
    if writer.chance(0.4):
        wrong = writer.pick([c for c in LEXICON["colour"] if c != colours[which]])
        clauses[which] = writer.pick(
            [
                f"the {things[which]} is not {wrong} but {colours[which]}",
                f"the {things[which]} was {wrong} once and is {colours[which]} now",
            ]
        )
    return _sentences(clauses) + f" What colour is the {things[which]}?", colours[which]


def _kind_of(writer: Writer) -> tuple[str, str]:
    kind = writer.pick(
        ["colour", "fruit", "vegetable", "job", "pet", "drink", "material", "day", "month", "room", "food"]
    )
    others = [
        name
        for name in ("colour", "fruit", "vegetable", "job", "drink", "material", "day", "month", "room")
        if name != kind
    ]
    options = sorted([kind, *writer.random.sample(others, 2)])
    word = writer.pick([w for w in LEXICON[kind] if "{" not in w])
    return f"{word}: {', '.join(options[:-1])} or {options[-1]}?", kind


def _odd_one(writer: Writer) -> tuple[str, str]:
    first, second = writer.random.sample(["colour", "fruit", "job", "room", "weather", "month", "pet", "drink"], 2)
    items = writer.random.sample(LEXICON[first], 3)
    odd = writer.pick([word for word in LEXICON[second] if word not in LEXICON[first]])
    mixed = [*items, odd]
    writer.random.shuffle(mixed)
    return f"Which word does not belong: {', '.join(mixed)}?", odd


def _whose(writer: Writer) -> tuple[str, str]:
    names = writer.random.sample(LEXICON["girl"] + LEXICON["boy"], 3)
    things = writer.random.sample(LEXICON["thingy"], 3)
    clauses = [f"{name} has the {thing}" for name, thing in zip(names, things, strict=True)]
    holders = dict(zip(things, names, strict=True))
    if writer.chance(0.5):
        thing = things[0]
        taker = names[1]
        clauses.append(
            writer.pick([f"{names[0]} gives the {thing} to {taker}", f"{taker} takes the {thing} from {names[0]}"])
        )
        holders[thing] = taker
    thing = writer.pick(things)
    return _sentences(clauses) + f" Who has the {thing}?", holders[thing]


def _more(writer: Writer) -> tuple[str, str]:
    first, second = writer.random.sample(LEXICON["girl"] + LEXICON["boy"], 2)
    one, two = writer.random.sample(range(2, 30), 2)
    thing = plural(writer.pick(LEXICON["thingy"]))
    if writer.chance(0.5):
        return f"{first} has {one} {thing} and {second} has {two}. Who has more?", first if one > two else second
    return f"{first} has {one} {thing} and {second} has {two}. Who has fewer?", first if one < two else second


# --------------------------------------------------------------------------------------------------------------------
# How-to's
# --------------------------------------------------------------------------------------------------------------------

LINKS = ["then", "after that", "next", "now", "when that is done,", "once you have done this,"]


def _steps(writer: Writer, part_of_title: str) -> list[str]:
    return [writer.raw(step) for title, _, steps in HOW_TO if part_of_title in title for step in steps][:3]


def how_to_document(writer: Writer) -> Document:
    """The steps of a task, as a list, in prose or in answer to a question."""
    writer.begin()
    title, needs, templates = writer.pick(HOW_TO)
    steps = [writer.raw(template) for template in templates]
    kind = writer.random.random()
    if kind < 0.35:
        body = "\n".join(f"{number}. {tidy(step)}." for number, step in enumerate(steps, 1))
    elif kind < 0.75:
        body = tidy(
            "first, "
            + steps[0]
            + ". "
            + " ".join(f"{writer.pick(LINKS)} {step}." for step in steps[1:-1])
            + f" finally, {steps[-1]}."
        )
    else:
        body = _sentences(steps)
    need = tidy(f"you need {needs}.")
    if writer.chance(0.5):
        return f"How to {title}\n{need}\n{body}" if writer.chance(0.6) else f"How to {title}\n{body}"
    question = writer.pick(
        [
            f"How do I {title}?",
            f"Tell me how to {title}.",
            f"What is the best way to {title}?",
            f"I want to {title}. What do I do?",
        ]
    )
    messages = [_user(question), _assistant(f"{need}\n{body}" if writer.chance(0.5) else body)]
    if writer.chance(0.3):
        number = int(writer.random.random() * (len(steps) - 1))
        messages += [_user(f"What do I do after this: {steps[number]}?"), _assistant(tidy(steps[number + 1] + "."))]
    if writer.chance(0.25):
        messages += [_user("What do I need?"), _assistant(need)]
    return messages


# --------------------------------------------------------------------------------------------------------------------
# Stories
# --------------------------------------------------------------------------------------------------------------------

OPENINGS = lines("""
    {hero} was a {mood} {who} who lived (near|behind|next to) {place#1} in {town}.
    once there was a {who} called {hero}. {He} lived in {town} with {his} {relative} and a {pet}.
    it was a {weather} {day} in {month}, and {hero} was {mood}.
    every {season}, {hero} went to {place#1} with {his} {relative}.
    {hero} loved {hobby}. {He} {often} did anything else on a {weather} day.
    in {town} there lived a {who} by the name of {hero}. everybody knew {him}, because {he} was so {mood}.
    {hero} had never been to {place#1} alone.
    "it is too {weather} to go out," said {hero}'s {relative}. but {hero} went out all the same.
""")
STORIES = [
    # lost and found
    lines("""
        one (morning|day|evening) {hero} lost {his} {colour#1} {thingy#1}.
        {He} looked in the {room}, under the {furniture} and even in the {room}, but it was not there.
        (so {he} asked {friend}|{He} told {friend} about it). "(have you seen|do you know where to find) my {thingy#1}?"
        "no," said {friend}, "but I saw {a_beast} with something {colour#1} (near|behind) {place#2}."
        they went to {place#2} together and looked {slowly} behind every (tree|wall|bench|bush).
        there it was, (under a heap of leaves|on top of a wall|in an old box), a little (dirty|wet|bent) but whole.
        {hero} was so {mood} that {he} (danced all the way home|gave {friend} half of {his} {food}|could not speak).
        from then on {he} {often} left the {thingy#1} (out of sight|at home|in {his} pocket).
    """),
    # a wish and patience
    lines("""
        {He} wanted (nothing more than|only) a {colour#1} {thingy#1}.
        it cost {n} coins, and {hero} had only {few}.
        {friend} said, "You could (sell {food} at the market|sweep the {room}|water my garden), and I will pay you."
        so {hero} worked {slowly} for {span}, (in the rain and in the sun|before school and after it).
        {His} {relative} said that it was too (hard|much), but {he} did not give up.
        when {he} had the money at last, the {thingy#1} was gone. somebody else had bought it.
        {hero} was {mood} and went home without a word.
        but on the table lay a parcel. it was the {colour#1} {thingy#1}, and a note: "For a good worker. {friend}."
    """),
    # helping an animal
    lines("""
        on the way to {place#1}, {he} heard a (small|strange|sad) sound.
        it was a {beast#1} with its (foot|leg|tail) caught in a (wire|fence|net).
        "do not be afraid," said {hero} {slowly}. the {beast#1} looked at {him} and kept still.
        {He} (cut|opened|bent) the wire with {his} (hands|knife), and the {beast#1} was free.
        it did not run away at once. it (followed {him} to the bridge|sat down by {him}|ate a piece of {his} {food}).
        {span} later {hero} (got lost in the fog|lost {his} way in the forest|fell into the river).
        who came to help? it was the {beast#1}. it (led {him} home|pulled {him} out|showed {him} the path).
        {friend} did not believe the story, but {hero} did not mind.
    """),
    # a mistake and an apology
    lines("""
        {He} was playing with a ball in the {room}, although {his} {relative} had said no.
        the ball (flew|rolled|jumped) (against|into) the {colour} {thingy#1}, and it broke.
        at first {hero} wanted to say that the {pet} had done it.
        (but the {pet} was asleep|but {he} was not a liar|then {he} thought of the {pet}) and {he} felt {mood}.
        so {he} went to {his} {relative} and said, "It was not the {pet}. it was me. I am sorry."
        {His} {relative} was (quiet at first|not angry for long). "thank you for telling me the truth," was the answer.
        they (glued|mended) the {thingy#1} together. it was not as {goodadj} as before, but they liked it even more.
    """),
    # a contest
    lines("""
        there was a (race|contest|fair) at {place#1} on {day}, and the prize was a {colour} {thingy#1}.
        "you will never win," said {friend}. "you are too (slow|small|young)."
        {hero} did not answer. {He} trained every (morning|evening) for {span}.
        on the day of the (race|contest) it was {weather} and {weather}.
        {friend} was (first|ahead) for a long time, and {hero} was only {ordinal}.
        then {friend} (fell|slipped|stopped) and cried out. {hero} could have gone on, but {he} turned back to help.
        they (walked|came) over the line together, last of all, and everybody (clapped|cheered).
        {hero} did not get the {thingy#1}. {He} got a friend, and that was (worth more|better).
    """),
    # a stranger and a meal
    lines("""
        one {weather} (night|evening) somebody knocked at the door. it was an old {job}, cold and {mood}.
        "may I come in? I have not eaten since {day}," said the stranger.
        there was not much in the house, only some {food#1} and a little {drink#1}.
        {hero} gave the stranger the {food#1} and kept none for {him}self.
        in the morning the stranger was gone, and so was the {weather} weather.
        on the table stood a {colour} {thingy#1} that had not been there before.
        whenever {hero} touched it, there was fresh {food#1} on the table, {often} too much and never too little.
        {He} shared it with {friend}, with {his} {relative}, and with everybody who knocked.
    """),
    # learning something
    lines("""
        {He} wanted to be a {job#1}, like {his} {relative}.
        "it is not easy," said the old {job#1} of {town}. "you have to (get up early|be patient|work hard)."
        on the first day {hero} did everything wrong. on the second day {he} did half of it wrong.
        {friend} laughed, but the {job#1} did not. "wrong is how it begins," said the {job#1}.
        after {span} {hero} could do it (almost|nearly) as well as the {job#1}, only slower.
        after {span} more there was nobody better in {town}.
        and when a {mood} child came and asked how to begin, {hero} said, "It is not easy. sit down."
    """),
    # a journey
    lines("""
        {He} packed some {food#1}, a bottle of {drink} and a {colour#1} {thingy#1}, and set out for {town#2}.
        the road went (past|along) {place#1} and then up into the hills.
        at noon {he} met {friend}, who was going to {town#2} as well, but on the other road.
        "my road is shorter," said {friend}. "mine is not so steep," said {hero}. so they went on alone.
        it began to (rain|snow), and {hero} had no coat, only the {thingy#1}.
        {He} slept in a barn with {few} {beast.s} and shared the {food#1} with them.
        in the morning the sun shone, and {town#2} lay below, {goodadj} and {colour}.
        {friend} arrived {span} later. the short road had not been short at all.
    """),
    # garden
    lines("""
        behind the house there was a (small|stony|forgotten) garden where nothing grew.
        {hero} put a {vegetable#1} seed into the ground and watered it every (morning|evening).
        {friend} said, "Nothing grows there. you are wasting your time."
        for {span} nothing happened. {hero} was {mood}, but {he} went on watering.
        then one {weather} morning there was a tiny green leaf.
        it grew and grew. a {beast#1} tried to eat it, but {hero} built a fence of {material}.
        in autumn there were {n} {vegetable#1.s}, more than {he} could carry.
        "I was wrong," said {friend}, and they made soup of them for the whole street.
    """),
    # letter
    lines("""
        the {job#1} brought a letter on {day#1}. it was not for {hero}, it was for {friend}.
        {friend} was away, so {hero} put the letter (behind the clock|into a drawer|under a {thingy}) and forgot it.
        {span} went by. then {friend} came home and asked, "Was there no letter for me?"
        {hero} turned red. {He} ran to the {room} and found it at once.
        {friend} opened it {slowly}. it said that {his_f} {relative#2} would arrive on {day#1} at {time#1}.
        "but that is today, and it is almost {time#1}!" they ran to {place#1} as fast as they could.
        the {relative#2} was just getting off the (train|boat|bus), with a {colour} {thingy#1} under one arm.
        nobody was angry. they ate {food} together and laughed about it until {time}.
    """),
]
ENDINGS = lines("""
    and that is the end of the story.
    and they were all {mood} for a long time.
    "tomorrow is another day," said {hero}, and fell asleep.
    {hero} never forgot it.
    if you go to {town}, you can still see it there.
    it was the best {day} of {his} life.
    {friend} still tells this story, but in that version it was all very different.
    nobody knows what happened after that.
""")
LEXICON |= {
    "a_beast": ["a {beast}"],
    "furniture": ["bed", "table", "chair", "sofa", "carpet", "cupboard", "bench"],
    "ordinal": ["third", "fourth", "fifth", "sixth", "last"],
}


def story(writer: Writer) -> tuple[str, list[tuple[str, str]]]:
    """A little story and questions about it."""
    girl = writer.chance(0.5)
    hero = writer.pick(LEXICON["girl" if girl else "boy"])
    friend_girl = writer.chance(0.5)
    friend = writer.pick([name for name in LEXICON["girl" if friend_girl else "boy"] if name != hero])
    pronouns = ("she", "her", "her") if girl else ("he", "him", "his")
    writer.begin(
        hero=hero, friend=friend, he=pronouns[0], him=pronouns[1], his=pronouns[2], He=pronouns[0].capitalize(),
        His=pronouns[2].capitalize(), his_f="her" if friend_girl else "his",
        who=writer.pick(["girl", "young woman", "farmer's daughter"] if girl else ["boy", "young man", "miller's son"]),
    )  # fmt: skip
    writer.memory["place#1"], writer.memory["place#2"] = writer.random.sample(LEXICON["place"], 2)
    plot = writer.pick(STORIES)
    clauses = [writer.pick_raw(OPENINGS)]
    clauses += [
        writer.raw(sentence)
        for number, sentence in enumerate(plot)
        if number in (0, 1, len(plot) - 2) or writer.chance(0.85)
    ]
    if writer.chance(0.6):
        clauses.append(writer.pick_raw(ENDINGS))
    text = tidy(" ".join(clauses))
    questions = [("Who is the story about?", f"It is about {hero}.")]
    if friend in text:
        questions.append(("Who else is in the story?", f"{friend}."))
    if (
        "thingy#1" in writer.memory
        and "colour#1" in writer.memory
        and f"{writer.memory['colour#1']} {writer.memory['thingy#1']}" in text
    ):
        questions.append((f"What colour was the {writer.memory['thingy#1']}?", f"It was {writer.memory['colour#1']}."))
    if "beast#1" in writer.memory:
        questions.append(("Which animal is in the story?", f"A {writer.memory['beast#1']}."))
    return text, [(question, tidy(answer)) for question, answer in questions]


def story_document(writer: Writer) -> Document:
    """A story alone, told on request or followed by questions."""
    text, questions = story(writer)
    kind = writer.random.random()
    if kind < 0.65:
        return text
    if kind < 0.8:
        ask = writer.pick(
            [
                "Tell me a story.",
                "Tell me a story about {}.",
                "Write a short story about {}.",
                "I would like to hear a story about {}, please.",
            ]
        )
        hero = questions[0][1].removeprefix("It is about ").rstrip(".")
        return [_user(ask.format(hero)), _assistant(text)]
    writer.random.shuffle(questions)
    messages = []
    for number, (question, answer) in enumerate(questions[: writer.pick([1, 2, 3])]):
        messages += [_user(f"{text}\n{question}" if number == 0 else question), _assistant(answer)]
    return messages


# --------------------------------------------------------------------------------------------------------------------
# Everyday talk and notes
# --------------------------------------------------------------------------------------------------------------------

TALK = [
    lines("""
        {greet}, {girl#1}. how are you (today|this {day})?
        I am {mood#1}. and you?
        (not bad|fine|quite well), thank you. (it is {weather#1} again|what a {weather#1} day).
        yes, it is {weather#1}. do you want to go to {place#1}?
        I would like to, but I have to help my {relative}. what about {day#1}?
        {day#1} is fine. let us meet at {time#1}.
        good, at {time#1} in front of {place#1}. see you on {day#1}!
    """),
    lines("""
        what are you doing?
        I am looking for my {thingy#1}. it is {colour#1}.
        is it in the {room#1}?
        no, I have already looked in the {room#1}.
        then it may be in the {room}. you {often} leave it there.
        you are right. here it is, my {colour#1} {thingy#1}. thank you!
    """),
    lines("""
        what shall we cook tonight?
        how about {food#1}?
        we had {food#1} {when}. I would rather have something with {vegetable#1.s}.
        then let us make {food} with {vegetable#1.s}. do we have any?
        no, but I can buy some. how many do we need?
        {count#1} should be enough. and bring some {drink} too.
        {count#1} {vegetable#1.s} and something to drink. I will be back soon.
    """),
    lines("""
        did you like the {thing_bought#1}?
        (not really|yes and no). the {part_any} was {goodadj}, but the {part_any} was {badadj}.
        what a pity. mine was not {badadj} at all.
        perhaps I was unlucky. I will ask the shop.
        do that. they were very {goodadj} to my {relative} last time.
    """),
    lines("""
        excuse me, how do I get to {place#1}?
        go straight on, turn (left|right) at {place#2}, and it is on the (left|right).
        is it far?
        no, about {few#1} minutes on foot.
        {few#1} minutes, and I turn at {place#2}. thank you very much!
        you are welcome.
    """),
    lines("""
        I am {mood} today.
        why? what happened?
        my {pet#1} is ill. it has not eaten since {day#1}.
        oh no. have you been to the vet?
        not yet. the vet is closed until {time}.
        a {pet#1} that has not eaten since {day#1} should see a doctor today. I will drive you.
        that is kind of you.
    """),
]
LEXICON |= {
    "thing_bought": [thing for names, _ in THINGS.values() for thing in names],
    "thing": [thing for names, _ in THINGS.values() for thing in names],
    "gadget": THINGS["gadget"][0],
    "part_any": [part for part in PARTS if not _is_plural(part)],
}


def talk_document(writer: Writer) -> Document:
    """Two people talk about everyday matters."""
    writer.begin()
    writer.memory["place#1"], writer.memory["place#2"] = writer.random.sample(LEXICON["place"], 2)
    turns = [writer.say(turn) for turn in writer.pick(TALK)]
    if writer.chance(0.4):
        first, second = writer.random.sample(LEXICON["girl"] + LEXICON["boy"], 2)
        return "\n".join(f"{(first, second)[number % 2]}: {turn}" for number, turn in enumerate(turns))
    if len(turns) % 2:
        turns.pop()
    return [(_user, _assistant)[number % 2](turn) for number, turn in enumerate(turns)]


NOTES = lines("""
    Shopping list: {count} {fruit.s}, {count} {vegetable.s}, {food}, {drink}, {food}.
    Meeting on {day} at {time} in the {room}. {girl} brings the {food}, {boy} brings the {thingy}.
    To {girl}: please feed the {pet}. The food is in the {room}. It does not like {food}. Back on {day}. {boy}
    Lost: a {colour} {thingy} near {place}. If you find it, please call {surname}, {street} {n}.
    Found: a {pet} with a {colour} ribbon, at {place}. It is {mood} but not hurt.
    For sale: {thing}, {colour}, hardly used, {amount}. The {part_any} is {goodadj}. No returns.
    {day}: {weather}. {day}: {weather} and {weather}, not as {weather} as before.
    Dear {girl}, thank you for the {colour} {thingy}. I like it very much. It is {weather} here. Yours, {boy}
    To do: call the {job}, clean the {room}, write to my {relative}, pick up the {thing}, do not forget the {food}.
    Opening hours: {day} to {day}, from {time} to {time}. Closed in {month}.
    {boy} is taller than {girl}, but not as tall as {boy}.
    I do not like {food}, but I like {food}. My {relative} likes neither.
    There are {n} {thingy.s} in the {room}, {few} of them {colour}. None of them is made of {material}.
    The {colour} {thingy} is made of {material}, not of {material}. It belongs to {girl}.
    If it is {weather} on {day}, we will go to {place}. If not, we will stay at home and eat {food}.
    {girl} can (swim|sing|drive|cook|draw|whistle), but she cannot (swim|sing|drive|cook|draw|whistle).
    Neither the {thing} nor the {thingy} was in the {room}. Both were in the {room}.
    {boy} would have come to {place}, but he had to {chore}.
    Nobody in {town} has ever seen a {colour} {beast}. Some say that there is one near {place}.
    {girl} used to {chore} on {day.s}. Now she does it on {day.s}.
    The {job} said that the {thing} was {badadj}. The {job} did not agree: it was {goodadj}, only {badadj} to look at.
    Either {girl} or {boy} has the key. It is not {boy}, so it must be somebody else.
    The {thing} costs {n} euros. The {thing}, which is {goodadj}, costs twice as much.
    Without the {thingy} we cannot open the {room}. Without {girl} we cannot find the {thingy}.
""")
LEXICON["chore"] = lines("""
    wash the dishes
    sweep the {room}
    feed the {pet}
    water the plants
    visit his {relative}
    paint the {room}
    repair the {thing}
    buy {food}
    cook {food}
    write a letter
    fold the laundry
    empty the bins
    mow the lawn
    iron the shirts
""")


def note_document(writer: Writer) -> Document:
    """Some short notes."""
    writer.begin()
    return "\n".join(writer.say(writer.pick(NOTES)) for _ in range(writer.pick([1, 2, 3, 4, 5])))


# --------------------------------------------------------------------------------------------------------------------
# What the script asks for
# --------------------------------------------------------------------------------------------------------------------

KINDS = ["review", "shop", "desk", "booking", "fact", "choice", "how-to", "story", "talk", "note"]
SHARES = [13, 52, 5, 2, 7, 9, 3, 4, 3, 2]


def document(writer: Writer) -> tuple[str, Document]:
    """One document for pretraining, after its kind."""
    kind = writer.random.choices(KINDS, SHARES)[0]
    makers: dict[str, Callable[[Writer], Document]] = {
        "review": review_document,
        "shop": shop_document,
        "desk": desk_document,
        "booking": booking_document,
        "fact": fact_document,
        "choice": choice_document,
        "how-to": how_to_document,
        "story": story_document,
        "talk": talk_document,
        "note": note_document,
    }
    return kind, makers[kind](writer)


Row = dict[str, str]
TRAIN_ROWS = {"delivery": 170, "returns": 150, "billing": 140, "technical": 130, "cancel": 110, "praise": 100}
TEST_ROWS = {"delivery": 60, "returns": 53, "billing": 49, "technical": 46, "cancel": 38, "praise": 34}


def demo_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """The demo's training and test rows: messages to a shop, with the desk that must act as the label."""
    train, test = demo_messages(seed)
    return [{"text": m.text, "label": m.desk} for m in train], [{"text": m.text, "label": m.desk} for m in test]


def demo_messages(seed: int) -> tuple[list[ShopMessage], list[ShopMessage]]:
    """The messages behind the demo's rows.

    Those for testing use more frames, phrases and things than those for training. No two are the same but for capitals
    and punctuation.
    """
    writer = Writer(f"demo-{seed}")
    things = [thing for names, _ in THINGS.values() for thing in names]
    taught = [thing for number, thing in enumerate(things) if number % 3]
    seen: set[str] = set()

    def messages(counts: dict[str, int], allowed: Allowed, names: Sequence[str], noise: float) -> list[ShopMessage]:
        made: list[ShopMessage] = []
        for label, count in counts.items():
            while count:
                message = shop_message(writer, allowed, label, things=names, noise=noise)
                key = " ".join(re.findall(r"\w+", message.text.lower()))
                if key not in seen:
                    seen.add(key)
                    made.append(message)
                    count -= 1
        writer.random.shuffle(made)
        return made

    return messages(TRAIN_ROWS, is_taught, taught, 0.08), messages(TEST_ROWS, lambda phrase: True, things, 0.12)


def chat_rows(seed: int, count: int = 40) -> list[dict[str, Messages]]:
    """Conversations in the OpenAI form, each with a system message, some of several turns."""
    writer = Writer(f"chat-{seed}")
    rows: list[dict[str, Messages]] = []
    while len(rows) < count:
        made = writer.pick(
            [
                lambda: shop_document(writer),
                lambda: desk_document(writer),
                lambda: booking_document(writer),
                lambda: how_to_document(writer),
            ]
        )()
        if isinstance(made, str) or made[-1]["role"] != "assistant":
            continue
        messages = made if made[0]["role"] == "system" else [_system(writer.pick(SHOP_SYSTEMS)), *made]
        if {"messages": messages} not in rows:
            rows.append({"messages": messages})
    return rows


def completion_rows(seed: int, count: int = 40) -> list[Row]:
    """Prompts with their completions: questions, opposites and reviews to judge."""
    writer = Writer(f"completion-{seed}")
    rows: list[Row] = []
    while len(rows) < count:
        made = writer.pick([fact_document, choice_document, review_document])(writer)
        if isinstance(made, str) or made[0]["role"] == "system" or len(made) != 2:
            continue
        row = {"prompt": made[0]["content"], "completion": made[1]["content"]}
        if row not in rows:
            rows.append(row)
    return rows


def notes(seed: int, size_bytes: int = 30_000) -> str:
    """Plain text, one document after another with an empty line between them."""
    writer = Writer(f"notes-{seed}")
    parts: list[str] = []
    size = 0
    while size < size_bytes:
        made = writer.pick([story_document, fact_document, how_to_document, note_document, review_document])(writer)
        if isinstance(made, str):
            parts.append(made)
            size += len(made.encode()) + 2
    return "\n\n".join(parts) + "\n"
