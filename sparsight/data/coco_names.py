"""What people call COCO's eighty categories: a table of synonyms, and phrases that hold a name and mean another thing.

Plurals are made by the vocabulary, and a longer phrase needs a row only where a word in it would name something else
("toilet bowl", "baby elephant"). Names that do not say which category is meant ("glass", "computer") are in no row.
Read by `objects.ObjectVocabulary.coco`.
"""

TABLE = """
person: man, woman, boy, girl, child, kid, baby, toddler, infant, lady, gentleman, guy, adult, teenager, pedestrian
person: human, player, batter, catcher, umpire, referee, skier, snowboarder, surfer, skateboarder, swimmer, runner
person: rider, biker, cyclist, bicyclist, motorcyclist, driver, bus driver, truck driver, taxi driver, passenger
person: worker, officer, policeman, policewoman, firefighter, fireman, soldier, farmer, chef, waiter, waitress
person: student, teacher, doctor, bride, groom, father, mother, son, daughter, someone, somebody
bicycle: bike, tricycle
car: automobile, suv, sedan, taxi, jeep, minivan, hatchback, passenger car
motorcycle: motorbike, motor bike, dirt bike, motor cycle, moped, scooter
airplane: plane, aeroplane, aircraft, airliner, jet, jetliner, passenger jet, passenger plane, biplane
bus: minibus, double decker, passenger bus
train: locomotive, steam engine, passenger train
truck: pickup, lorry, firetruck
boat: ship, sailboat, canoe, kayak, ferry, yacht, rowboat, speedboat, motorboat, passenger boat
traffic light: traffic signal, stoplight, stop light, street signal
fire hydrant: hydrant, fireplug
stop sign: stopsign
bird: seagull, gull, pigeon, duck, goose, swan, owl, eagle, hawk, parrot, parakeet, crow, sparrow, pelican, flamingo
bird: chicken, rooster, hen, ostrich, peacock, penguin, baby bird, adult bird
cat: kitten, kitty, feline, baby cat, adult cat
dog: puppy, pup, canine, sheep dog, sheepdog, poodle, labrador, bulldog, terrier, beagle, baby dog, adult dog
horse: pony, foal, stallion, mare, colt, baby horse, adult horse
sheep: lamb, ewe, baby sheep, adult sheep
cow: cattle, bull, calf, ox, heifer, baby cow, adult cow
elephant: baby elephant, adult elephant
bear: grizzly, bear cub, baby bear, adult bear
zebra: baby zebra, adult zebra
giraffe: baby giraffe, adult giraffe
backpack: back pack, rucksack, knapsack
umbrella: parasol
handbag: hand bag, purse, pocketbook
tie: necktie, bowtie
suitcase: suit case, luggage, briefcase
frisbee: flying disc, flying disk
snowboard: snow board
sports ball: ball
baseball bat: bat
baseball glove: mitt, catcher mitt
skateboard: skate board, longboard
surfboard: surf board, bodyboard, boogie board
tennis racket: racket, racquet
wine glass: wineglass, glass of wine
cup: mug, teacup
sandwich: hamburger, burger, cheeseburger, panini
hot dog: hotdog, chili dog, corn dog
donut: doughnut
cake: cupcake, cup cake, carrot cake, cheesecake
chair: armchair, stool, recliner
couch: sofa, loveseat, settee
potted plant: plant, houseplant, flower pot, flowerpot
dining table: table, desk
toilet: urinal, toilet bowl
tv: television, monitor, flat screen
laptop: notebook computer, macbook
cell phone: phone, cellphone, smartphone, telephone, iphone
microwave: microwave oven
oven: stove, stovetop
toaster: toaster oven
sink: washbasin, wash basin
refrigerator: fridge, freezer
teddy bear: teddy, stuffed bear
hair drier: hair dryer, hairdryer, blow dryer, blow drier
toothbrush: tooth brush
"""

NOT_OBJECTS = """
hot dog, hotdog, corn dog, chili dog, teddy bear, stuffed bear, sea horse, horse fly, carrot cake
train track, train station, bus stop, bus station, boat house, boat dock, jet ski, car seat, driver seat, bike rack
toilet paper, toilet brush, orange juice, apple juice, apple pie, banana bread, pizza box, dog food, cat food
dog house, bird house, bird bath, bird cage, bird feeder, flower bed, river bed, table tennis, chair lift, oven mitt
mouse pad, remote area, remote location, power plant, book shelf, book store, cake stand, knife block, horse shoe
phone booth, phone pole, telephone booth, telephone pole, bottle opener, kite string
"""


def coco_synonyms() -> dict[str, tuple[str, ...]]:
    """Other names, in the singular, by category; a category without any is left out."""
    found: dict[str, tuple[str, ...]] = {}
    for line in TABLE.strip().splitlines():
        category, _, names = line.partition(": ")
        found[category] = (*found.get(category, ()), *names.split(", "))
    return found


def not_objects() -> tuple[str, ...]:
    """Phrases that hold a category's name and do not say that it is there."""
    return tuple(phrase for line in NOT_OBJECTS.strip().splitlines() for phrase in line.split(", "))
