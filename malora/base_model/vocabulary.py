"""The words that generated pre-training text is made of."""

# ruff: noqa: SIM905 (lists of words read best as text)
from __future__ import annotations

MONTHS = (
    "January February March April May June July August September October November December"
).split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FIRST_NAMES = (
    "Ada Adam Aisha Alan Alice Amara Amy Ana Andrea Anna Anton Aria Arthur Astrid Ben Bella Bruno "
    "Carla Carlos Cecilia Chen Chloe Clara Claude Dana Daniel David Diana Diego Dmitri Elena Eli "
    "Elsa Emil Emma Eric Erika Esther Eva Farid Fatima Felix Fiona Frank Freya Gabriel George "
    "Grace Greta Hana Hannah Hassan Helen Henry Hugo Ida Igor Ines Ingrid Irene Isaac Ivan Jack "
    "James Jane Jasmine Joan Jonas Jorge Julia Kai Karim Kate Kenji Kofi Lara Laura Leah Lena Leo "
    "Lily Linda Louis Lucia Lukas Lydia Maja Marco Maria Mark Martha Martin Maya Mei Miguel Mila "
    "Mina Mohamed Monica Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Paula Pedro Peter "
    "Petra Priya Rachel Rafael Raj Rita Robert Rosa Ruth Sam Samira Sara Sofia Sven Tara Thomas "
    "Tim Tom Uma Vera Victor Viola Walter Wei Yara Yusuf Zara Zoe"
).split()
LAST_NAMES = (
    "Adams Ahmed Andersen Baker Bauer Becker Bell Berg Brown Carter Castro Clark Cohen Cooper "
    "Costa Cruz Davies Diaz Dubois Evans Fischer Fisher Fontana Foster Garcia Gomez Gray Green "
    "Hall Hansen Harris Hill Hoffman Hughes Ibrahim Ito Jackson Jensen Johnson Jones Kaya Keller "
    "Kim King Klein Kumar Lang Larsen Lee Lewis Lopez Marino Martin Mason Meyer Miller Moore "
    "Morales Morgan Murphy Nakamura Nguyen Nielsen Novak Okafor Olsen Owen Park Parker Patel "
    "Perez Petrov Phillips Price Reed Rivera Roberts Romano Rossi Russo Sato Schmidt Scott Shah "
    "Silva Singh Smith Stone Suzuki Tanaka Taylor Torres Turner Vargas Wagner Walker Wang Ward "
    "Weber White Wilson Wolf Wood Wright Yamada Young Zhang"
).split()
CITIES = (
    "Accra|Amsterdam|Ankara|Athens|Baltimore|Bangkok|Barcelona|Basel|Beijing|Belfast|Berlin|Bern|"
    "Bogota|Bologna|Boston|Bristol|Brussels|Budapest|Cairo|Cape Town|Cardiff|Chicago|Cologne|"
    "Copenhagen|Cork|Dakar|Dallas|Delhi|Denver|Detroit|Dresden|Dublin|Edinburgh|Florence|Frankfurt|"
    "Geneva|Genoa|Ghent|Glasgow|Granada|Hamburg|Hanoi|Havana|Helsinki|Houston|Istanbul|Jakarta|"
    "Kyoto|Lagos|Leeds|Leipzig|Lima|Lisbon|Liverpool|London|Los Angeles|Lyon|Madrid|Malmo|"
    "Manchester|Manila|Marseille|Melbourne|Memphis|Mexico City|Miami|Milan|Montreal|Mumbai|Munich|"
    "Nairobi|Naples|New York|Nice|Osaka|Oslo|Oxford|Palermo|Paris|Perth|Porto|Prague|Quito|Riga|"
    "Rome|Rotterdam|San Diego|San Francisco|Santiago|Seattle|Seoul|Seville|Shanghai|Sofia|"
    "Stockholm|Sydney|Tallinn|Tokyo|Toronto|Tunis|Turin|Utrecht|Valencia|Vancouver|Venice|Vienna|"
    "Vilnius|Warsaw|York|Zagreb|Zurich"
).split("|")
COLOURS = (
    "red blue green yellow black white grey brown purple orange pink silver golden beige turquoise"
).split()
ITEMS = (
    "apple bag ball basket belt bike blanket book boot bottle bowl box brush bucket button cable "
    "camera candle cap card chair clock coat cup curtain cushion desk dress drill drum fan flag "
    "folder fork frame guitar hammer hat helmet jacket jar kettle key keyboard knob ladder lamp "
    "lantern laptop lemon lock magnet map mirror monitor mug needle notebook oven paddle pan pen "
    "pencil phone pillow pipe plate pot printer puzzle radio ring robot rope ruler scarf screen "
    "shirt shoe shovel sofa speaker spoon stamp stool suitcase sweater table tablet tent ticket "
    "towel toy tray tripod umbrella vase wallet watch wheel whistle window"
).split()
ADJECTIVES = (
    "big small old new heavy light cheap wooden plastic broken clean soft hard round square long "
    "short wide narrow quiet fast slow warm cold simple strange bright dark"
).split()
JOBS = (
    "accountant actor architect artist baker carpenter chef clerk dentist designer doctor driver "
    "editor engineer farmer gardener judge lawyer librarian manager mechanic musician nurse "
    "painter photographer pilot plumber professor sailor scientist singer tailor teacher"
    " translator writer"
).split()
COMPANIES = (
    "Acorn Works|Alpine Foods|Amber Bank|Atlas Freight|Blue Harbor|Bright Energy|Cedar Press|"
    "City Rail|Clear Water|Copper Hill|Delta Tools|Eagle Air|Echo Music|Fern Health|Global Parts|"
    "Granite Homes|Green Valley|Harvest Market|Iron Gate|Juniper Labs|Lake Motors|Lotus Design|"
    "Maple Software|North Star|Ocean Travel|Orchid Hotels|Pine Street Books|Quick Post|Red Kite|"
    "River Garden|Silver Line|Solar Point|Stone Bridge|Summit Sports|Union Glass|West Wind"
).split("|")
CATEGORIES = {
    "animal": "dog cat horse cow sheep lion tiger bear wolf fox rabbit mouse goat pig elephant "
    "monkey whale shark eagle owl duck goose snake frog bee spider",
    "fruit": "apple banana cherry grape lemon lime mango melon orange peach pear plum fig kiwi "
    "apricot coconut strawberry raspberry",
    "vehicle": "car bus train truck bike boat ship plane tram van taxi scooter tractor helicopter "
    "rocket canoe ferry",
    "tool": "hammer saw drill wrench screwdriver shovel axe chisel rake pliers ladder knife file",
    "country": "France Spain Italy Germany Norway Sweden Japan China India Brazil Peru Chile Kenya "
    "Egypt Ghana Canada Mexico Poland Greece Turkey",
    "instrument": "piano guitar violin cello drum flute trumpet harp clarinet oboe saxophone organ",
    "clothing": "shirt coat hat dress shoe boot glove scarf sock belt jacket sweater skirt",
    "food": "bread cheese rice pasta soup butter egg salad pizza cake honey salt sugar sausage",
    "body part": "arm leg hand foot head eye ear nose mouth knee elbow finger toe shoulder neck",
    "metal": "iron copper gold silver tin lead zinc nickel steel bronze aluminium platinum",
    "weather": "rain snow wind fog storm thunder hail sunshine frost cloud drizzle",
    "furniture": "table chair sofa bed desk shelf cupboard stool wardrobe bench drawer",
}
MARKERS = (
    "answer result output reply value gives becomes means note item field entry key label name tag "
    "code form short long new old final first second target source summary code word words line "
    "what where who number amount total class kind type group part this that these out then so "
    "solution correct written clean parsed fixed version variant mapped to is equals data record "
    "info detail details response read find get show tell return print x y z A B C"
).split()
"""Words that introduce an answer. The markers of tasks that adapters are meant to learn (date,
order, team, intent, request, sql, topic, text) stay out: the base has no answer for them."""
UNITS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("t", "kg", 1000),
    ("l", "ml", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("dozen", "pieces", 12),
    ("euros", "cents", 100),
    ("pairs", "pieces", 2),
)
