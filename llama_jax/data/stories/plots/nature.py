"""Stories of growing and living things: an animal in need, a seed, a snowman's nose."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import FAIR_DAYS, HOMES, OPENING, cast

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
