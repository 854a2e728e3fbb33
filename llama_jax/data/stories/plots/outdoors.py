"""Plots of play and nature: a lost toy, a kite, a picnic, an animal in need, a seed, a snowman."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import FAIR_DAYS, HOMES, OPENING, cast

TOYS = table(
    """
    toy / look
    ball / red, blue, bouncy
    teddy / soft, brown, fluffy
    doll / small, pretty, soft
    truck / red, yellow, shiny
    train / green, shiny, wooden
    boat / white, blue, wooden
    bunny / pink, soft, fluffy
    dragon / green, purple, orange
    robot / silver, shiny, square
    """
)

PLAY_PLACES = table(
    """
    place / spot
    park, playground, garden, meadow, farm, zoo \
    / under a bush, behind a tree, in the tall grass, next to a big stone, on a pile of leaves
    """
)

LOST_TOY = Plot(
    (cast("Lily", "Tim", "Mom"), HOMES, FAIR_DAYS, TOYS, PLAY_PLACES),
    OPENING
    + script(
        """
        - {hero} had {a look} {toy} and took it everywhere.
        - {His} favorite toy was {a look} {toy}.
        - {hero} loved {his} {look} {toy} more than any other toy.

        - One {day}, {hero} took the {toy} to the {place}.
        - One {day}, {he} went to the {place} with {elder} and took the {toy} along.
        - One {day}, {elder} and {hero} went to the {place} with the {toy}.

        - {He} ran and jumped. Then {he} saw that the {toy} was gone.
        - But when it was time to go home, the {toy} was gone.
        - {hero} chased a butterfly. When {he} came back, the {toy} was gone.

        - "Oh no! Where is my {toy}?" cried {hero}.
        - "I lost my {toy}!" said {hero} and began to cry.
        - {hero} felt very sad. "I can not find my {toy}," {he} said.

        - "Do not worry," said {elder}. "We will look for it together."
        - {elder} gave {him} a hug. "Let us look for it."
        - {elder} took {his} hand and said, "I will help you."

        - They looked here and there, but there was no {toy}.
        - First they looked in the bag, but there was no {toy}.

        - Then {hero} looked {spot}. There was the {toy}!
        - Then {elder} looked {spot} and smiled. The {toy} was there!
        - At last, {hero} saw something {spot}. It was the {toy}!

        - {hero} hugged the {toy} and always kept it close after that.
        - {hero} was so happy that {he} danced. "Thank you, {elder}!" {he} said.
        - {hero} hugged the {toy}. {He} learned that it is good to ask for help.
        - {hero} laughed and gave {elder} a hug. It was a good day after all.
        """
    ),
)

STUCK_THINGS = table(
    """
    thing / look / play / rise
    kite / red, yellow, striped, purple / flew the kite over the grass / The wind pulled it up
    balloon / round, pink, silver, blue / ran along with the balloon / The string slipped away
    plane / white, silver, paper / threw the plane into the air / The wind turned it
    ball / green, orange, bouncy / kicked the ball very hard / It flew up and up
    """
)

TOOLS = table(
    """
    tool / use
    stick, ladder, broom, net, rope / reached up and pulled, reached up high and pushed
    """
)

FIELDS = table(
    """
    day / field / kind
    windy day, windy morning, windy afternoon / park, hill, meadow, field \
    / oak, apple, pine, cherry
    """
)

STUCK_KITE = Plot(
    (cast("Ben", "Mia"), HOMES, STUCK_THINGS, TOOLS, FIELDS),
    OPENING
    + script(
        """
        - {hero} had {a look} {thing}.
        - For {his} birthday, {he} got {a look} {thing}.
        - {He} liked to play with {his} {look} {thing}.

        - One {day}, {he} went to the {field} with {his} friend {friend}.
        - One {day}, {he} and {his} friend {friend} took the {thing} to the {field}.

        - {hero} {play}. {rise}, and the {thing} got stuck in {a kind} tree.
        - {hero} {play}. {rise}. Then the {thing} was stuck in {a kind} tree!

        - "Oh no, my {thing}!" cried {hero}.
        - "It is too high," said {hero} with a sad face.
        - "How can I get it back?" asked {hero}.

        - They jumped high, but they could not reach it.
        - {friend} shook the tree, but the {thing} did not move.
        - They tried to climb up, but it was too hard.

        - Then {friend} had an idea. "We need {a tool}," {friend_he} said.
        - "I know!" said {friend}. "We can use {a tool}."

        - {friend} ran home and brought it. {hero} {use}, and the {thing} came down.
        - They went to get it. {hero} {use}. Down came the {thing}!

        - "We did it!" {hero} and {friend} played until the sun went down.
        - "You are so clever!" said {hero} and let {friend} play too.
        - {hero} clapped {his} hands. "Thank you, {friend}!" {he} said.
        - {hero} learned that working together makes hard things easy.
        """
    ),
)

FOODS = table(
    """
    food
    sandwiches, rolls, pancakes, muffins, cherries, apples
    """
)

PICNIC_PLACES = table(
    """
    spot / floor
    by the lake, by the river, in the meadow, in the park, in the garden, under the trees \
    / on the kitchen floor, on the rug, under the table, next to the fire
    """
)

PICNIC = Plot(
    (cast("Anna", "Tom", "Grandma"), HOMES, FAIR_DAYS, FOODS, PICNIC_PLACES),
    OPENING
    + script(
        """
        - One {day}, {hero} and {his} friend {friend} had a picnic with {elder}.
        - One {day}, {he} and {elder} took {his} friend {friend} to a picnic.

        - They filled a big basket with {food}.
        - {hero} packed {food} in a basket and took a warm blanket.

        - They put the basket of {food} down {spot}.
        - They sat down {spot} and looked at the {food}.

        - But soon the sky turned gray, and it began to rain.
        - Just then, a dark cloud came, and it began to rain.
        - Then there was a boom of thunder, and it began to rain.

        - "Our {food} will get wet!" said {hero}.
        - "Oh no, our nice {food}!" cried {hero}.

        - "Quick, take the basket!" said {elder}. They ran home.
        - They picked up the basket and ran home.

        - Then {friend} had an idea. "We can have it right here!"
        - "We can still have a picnic," said {friend}.

        - So they sat {floor} and ate all the {food}.
        - They sat {floor} and ate. The {food} tasted so good!

        - "This is the best picnic ever," said {hero}.
        - {hero} learned that a rainy day can be a happy day too.
        - Outside it rained, but {hero} and {friend} laughed and told jokes.
        """
    ),
)

PLAY = (LOST_TOY, STUCK_KITE, PICNIC)

SMALL_ANIMALS = table(
    """
    creature / where / trouble / help / joy
    bird / under a tree / had fallen out of its nest \
    / put it back into the nest / sang a sweet song
    turtle / near the pond / lay on its back and could not turn over \
    / turned it over with both hands / crawled slowly into the water
    kitten / beside the road / was wet and cold \
    / dried it with a warm scarf / purred and closed its eyes
    puppy / by the gate / had a thorn in its paw \
    / pulled out the thorn / wagged its tail and licked {his} hand
    butterfly / near the fence / was caught in a spider web \
    / opened the web with a thin stick / danced over the flowers
    frog / behind the shed / sat in a deep bucket and could not get out \
    / tipped the bucket over / hopped happily into the grass
    duckling / on the path / could not find its mother \
    / carried it to the pond / swam to its mother and quacked
    bee / by the well / had fallen into a puddle \
    / lifted it out with a leaf / dried its wings and buzzed away
    rabbit / at the edge of the woods / had one foot caught in a fence \
    / pulled the wire apart / hopped in a happy circle
    lamb / on the hill / was stuck in the mud \
    / lifted it out of the mud / ran back to the sheep
    """
)

SMALL_ANIMAL = Plot(
    (cast("Max", "Sue", "Grandpa"), HOMES, FAIR_DAYS, SMALL_ANIMALS),
    OPENING
    + script(
        """
        - One {day}, {hero} went for a walk with {elder}.
        - One {day}, {elder} and {hero} were out for a walk.

        - {Where}, {hero} saw a tiny {creature}.
        - Then {hero} heard a soft sound. {Where}, there was a little {creature}.

        - The {creature} {trouble}. It looked scared.
        - The poor {creature} {trouble}.
        - "Look!" said {hero}. The {creature} {trouble}.

        - "Can we help it?" asked {hero}. "Yes, but we must be gentle," said {elder}.
        - "Poor little {creature}," said {hero}. "I will help you."
        - {hero} felt sorry for it. "Do not be afraid," {he} said in a soft voice.

        - Very slowly, {hero} {help}.
        - With great care, {he} {help}. {elder} stood close and watched.
        - {hero} took a deep breath and {help}.

        - The {creature} looked at {him} for a moment. Then it {joy}.
        - Soon the {creature} felt better. It {joy}.

        - "You were kind and careful," said {elder}. {hero} felt proud.
        - "You have a good heart," said {elder}, and {hero} smiled.
        - "Goodbye, little {creature}!" called {hero} and waved.

        - That night, {hero} dreamed of the {creature}.
        - {hero} learned that even a small child can be a big help.
        - From that day on, {hero} looked for the {creature} on every walk.
        """
    ),
)

SEEDS = table(
    """
    seed / sprout / plant / gift
    sunflower seed / thick green stem / tall sunflower / gave some seeds to the birds
    bean / curly green shoot / long bean plant / ate the beans with {elder}
    pumpkin seed / fat green vine / huge orange pumpkin / made a big pot of soup
    tomato seed / tiny green leaf / tall tomato plant / ate the tomatoes for dinner
    melon seed / thin green vine / round melon / gave {elder} the first piece
    strawberry seed / tiny green shoot / big strawberry plant / shared the berries with {elder}
    poppy seed / thin green stem / bright red poppy / showed it to {elder}
    """
)

SEED = Plot(
    (cast("Emma", "Sam", "Mom"), HOMES, FAIR_DAYS, SEEDS),
    OPENING
    + script(
        """
        - One {day}, {elder} gave {him} {a seed}.
        - One {day}, {hero} found {a seed}. "What is it?" {he} asked {elder}.

        - "Put it in the earth and wait," said {elder}.
        - "If you take good care of it, it will grow," said {elder}.

        - {hero} dug a little hole and put the {seed} in.
        - {hero} filled a pot with soil and pushed the {seed} in.

        - Every morning, {he} gave it some water and waited.
        - {He} watered it every day and even sang to it.

        - But nothing happened. "Why does it not grow?" asked {hero}.
        - But there was only brown soil, and {hero} was sad.

        - "Some things take time," said {elder}. "Do not give up."
        - "Be patient," said {elder}. "It is busy under the ground."

        - So {hero} waited. Then one day, there was {a sprout}!
        - {hero} kept on watering. One morning, there was {a sprout}!

        - The sun shone, and soon it was {a plant}.
        - It grew and grew. Soon it was {a plant}.

        - {hero} was proud and {gift}.
        - {hero} {gift} and felt very proud.
        - {hero} {gift}. Good things take time.
        """
    ),
)

SNOW = table(
    """
    eyes / thief
    two black stones, two buttons, two nuts \
    / a hungry rabbit, a brown horse, a little deer, a fat goose
    """
)

SNOWMAN = Plot(
    (cast("Leo", "Nora"), HOMES, SNOW),
    OPENING
    + script(
        """
        - One winter morning, {hero} looked outside. Everything was white!
        - One cold morning, {he} saw snow on all the roofs.

        - {He} and {his} friend {friend} made a big, round snowman.
        - {He} ran out with {his} friend {friend}, and they built a snowman.

        - They gave it {eyes} for eyes and a carrot for a nose.
        - It got {eyes} for eyes and a carrot for a nose.

        - The next day, the carrot was gone! "Who took the nose?" asked {hero}.
        - But in the morning, the carrot was gone. "That is not nice!" said {hero}.

        - But {friend} saw tracks in the snow.
        - "Look, there are tracks," said {friend}. They went after them.

        - Behind the house stood {thief} with the carrot.
        - The tracks led to {thief}. It was eating the carrot!

        - "It must be very hungry," said {friend}.
        - "The poor thing found no food," said {friend}.

        - "It can have the carrot," said {hero} and smiled.
        - "Then it can have the carrot," said {hero}.

        - They used a pine cone for the new nose, and everyone was happy.
        - From then on, {hero} and {friend} fed the animals each day.
        - {hero} and {friend} made a new nose from a stick and laughed.
        """
    ),
)

NATURE = (SMALL_ANIMAL, SEED, SNOWMAN)
