"""Plots of home and giving: the dark, a cake, a broken treasure, a treat, a gift, a sick friend."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import FAIR_DAYS, HOMES, OPENING, cast

NOISES = table(
    """
    noise / place / maker / after
    tap tap tap / at the window / a branch that moved in the wind / The branch seemed to wave
    scratch scratch / at the door / the cat who wanted to come in / The cat purred in {his} arms
    thump thump / under the bed / the dog and its happy tail / The dog licked {his} nose
    drip drip / in the bathroom / water that fell into the sink / {elder} turned off the water
    tick tock / in the hall / the old clock on the wall / The clock had a round face
    hoo hoo / outside / an owl in the tree / The owl blinked and flew away
    squeak squeak / in the corner / a tiny mouse with a crumb / The mouse ran into its hole
    flap flap / near the wall / the curtain in the wind / {elder} closed the window
    """
)

LIGHTS = table(
    """
    light / cuddle
    lamp, lantern, candle / pillow, blanket, teddy
    """
)

DARK = Plot(
    (cast("Ella", "Jack", "Grandma"), HOMES, NOISES, LIGHTS),
    OPENING
    + script(
        """
        - {He} was afraid of the dark.
        - {hero} liked the day, but {he} did not like the night.
        - All day {he} was brave, but at night {he} was afraid.

        - One night, {hero} heard a strange noise {place}. "{Noise}!" it went.
        - One night, when {he} was in bed, there was a noise {place}. "{Noise}!"

        - {hero} pulled the blanket over {his} head. "A monster!" {he} thought.
        - {His} heart beat fast. "Who is there?" {he} whispered.
        - {He} held {his} {cuddle} tight. "A monster!" {he} thought.

        - "{elder}!" {he} called. {elder} came with a {light}.
        - {He} called for {elder}, and {elder} came with a {light}.

        - "Let us look together," said {elder}. Step by step, they went to look.
        - "Take my hand," said {elder}. They held up the light and looked.

        - It was not a monster at all. It was only {maker}!
        - And what did {he} see? It was just {maker}!

        - {hero} began to laugh. {after}.
        - {after}, and {hero} had to laugh.

        - "Good night, my brave {child}," said {elder}. Soon {hero} was fast asleep.
        - {hero} closed {his} eyes and was not afraid any more.
        - {hero} learned that scary things are small when you look at them.
        """
    ),
)

BAKED = table(
    """
    kind / topping
    chocolate, lemon, carrot, honey, plum, apple, cherry / sugar, cream, nuts, berries
    """
)

MISHAPS = table(
    """
    mishap / excuse / remedy
    dropped the eggs on the floor / The eggs are broken \
    / cleaned the floor and got more eggs
    knocked over the bag of flour / There is flour everywhere \
    / swept up the flour and got more
    put in salt and not sugar / I took the wrong jar \
    / made a new bowl of dough and tasted the sugar first
    spilled the milk all over the table / The milk is gone \
    / wiped the table and got more milk
    forgot to watch the oven / It is black and burned \
    / washed the pan and started all over again
    """
)

GUESTS = table(
    """
    guest / delight
    Mom, Grandma, Grandpa, Aunt May, Uncle Joe, the neighbors \
    / ate two big pieces, asked for more, smiled with joy, ate every last crumb
    """
)

BAKING = Plot(
    (cast("Finn", "Amy", "Dad"), HOMES, FAIR_DAYS, BAKED, MISHAPS, GUESTS),
    OPENING
    + script(
        """
        - One {day}, {hero} wanted to bake {a kind} cake for {guest}.
        - One {day}, {he} said, "Let us bake {a kind} cake for {guest}!"

        - "What a nice idea!" said {elder}. They mixed and stirred.
        - {elder} got out a big bowl and a spoon.
        - {hero} put on an apron and helped {elder} mix and stir.

        - But then {hero} {mishap}.
        - {hero} was in a hurry, and {he} {mishap}.

        - "Oh no! {excuse}!" {he} cried.
        - "I am so sorry," said {hero}. "{excuse}."

        - "Everyone makes mistakes," said {elder}. "We can try again."
        - {elder} only laughed. "That can happen to every cook."

        - So they {remedy}.
        - Together, they {remedy}.

        - Soon the cake was golden, and they put {topping} on top.
        - This time all went well. They put {topping} on the warm cake.

        - "This is so good!" everyone said.
        - Everyone {delight}.

        - {hero} was proud and gave {elder} a hug.
        - {hero} learned that you can always try again.
        - "I am glad that we did not give up," said {hero}.
        """
    ),
)

TREASURES = table(
    """
    thing / look / crack
    vase, mug, bowl, plate, teapot / blue, yellow, old, lovely / broke into three pieces
    lamp, clock, picture frame / old, golden, green, lovely / broke in two
    music box / wooden, old, red, lovely / lost its lid
    """
)

SLIPS = table(
    """
    game / slip
    played with a ball in the living room / the ball hit
    danced around the room / {his} arm hit
    ran through the house like a horse / {his} foot bumped the table with
    jumped from chair to chair / {his} knee bumped the shelf with
    spun around and around / {his} hand hit
    """
)

BROKEN = Plot(
    (cast("Zoe", "Noah", "Mom"), HOMES, TREASURES, SLIPS),
    OPENING
    + script(
        """
        - {elder} had {a look} {thing} and loved it.
        - {elder} had {a look} {thing} on a shelf.

        - One rainy day, {hero} {game}.
        - One day, {hero} was bored. {He} {game}.

        - Crash! By accident, {slip} the {thing}. It fell and {crack}.
        - Then {slip} the {thing}. It fell down and {crack}.

        - {hero} was scared, but {he} knew that it was better to tell the truth.
        - First, {he} hid it, but {he} felt bad and did not want to lie.
        - "What should I do?" {he} thought. But {he} did not want to lie.

        - "I broke your {thing}," {he} told {elder}. "I am very sorry."
        - "{elder}, I broke your {thing}," {he} said in a small voice.

        - "Thank you for telling me the truth," said {elder}.
        - "I am glad that you told me," said {elder} with a sigh.

        - "We can fix it." They put it together with glue.
        - They got some glue. Soon the {thing} was whole again.

        - {hero} felt light and happy. {He} never played near the {thing} again.
        - {hero} learned that telling the truth makes things better.
        - {hero} hugged {elder}. Telling the truth felt better than hiding.
        """
    ),
)

HOME = (DARK, BAKING, BROKEN)

TREATS = table(
    """
    treat / look
    cookie / big, round, sweet
    muffin / warm, soft, sweet
    apple / red, juicy, shiny
    orange / big, juicy, sweet
    sandwich / big, thick
    pancake / warm, golden, round
    pretzel / warm, long, soft
    waffle / warm, golden, crispy
    """
)

SITES = table(
    """
    site
    on a bench, on the steps, under a tree, in the grass, by the pond, on the wall
    """
)

SHARE_TREAT = Plot(
    (cast("Oliver", "Ruby", "Dad"), HOMES, FAIR_DAYS, TREATS, SITES),
    OPENING
    + script(
        """
        - One {day}, {elder} gave {him} {a look} {treat}.
        - One {day}, {hero} had {a look} {treat} from {elder}.

        - {He} sat down {site} to eat it alone.
        - {He} sat down {site} with the {treat}.

        - Then {his} friend {friend} came by. {Friend_he} looked hungry.
        - Just then, {he} saw {his} friend {friend}.

        - "I forgot my lunch," said {friend}. "May I have a bite?"
        - "That {treat} smells so good," said {friend}. "May I have some?"

        - "No, it is mine," said {hero} and turned away.
        - {hero} held the {treat} close. "But I want all of it," {he} said.

        - {friend} looked down and said nothing.
        - {friend} was quiet. A tear fell on {friend_his} shoe.

        - {hero} looked at the {treat}. It was not so nice any more.
        - {hero} began to feel bad. "How would I feel?" {he} thought.

        - "Wait, we can share," said {hero} and broke the {treat} in two.
        - So {he} broke the {treat} in two. "Here is a piece for you," said {hero}.

        - "Mmm, so good!" said {friend}. {hero} was glad and ate, too.
        - "Thank you!" said {friend}. Sharing made the {treat} taste even better.
        - {hero} learned that sharing makes two people happy.
        - The next day, {friend} brought a big lunch to share with {hero}.
        """
    ),
)

GIFTS = table(
    """
    gift / look / gather / make / use
    necklace / pretty, long / round beads / put them on a string \
    / put it on right away
    card / big, funny / paper and paint / drew a heart and many flowers \
    / put it on the wall
    crown / golden, shiny / yellow paper / cut and folded the paper \
    / wore it all day
    bird house / little, wooden / wood and nails / built four walls and a roof \
    / hung it in a tree
    scarf / warm, striped / red and blue yarn / knitted row after row \
    / put it on right away
    basket / round, yellow / long dry grass / bent and wove the grass \
    / filled it with apples
    puppet / funny, tiny / an old sock and two buttons / sewed on the eyes and a red mouth \
    / made it talk in a silly voice
    """
)

GIFT = Plot(
    (cast("Lucy", "Henry", "Grandma"), HOMES, GIFTS),
    OPENING
    + script(
        """
        - Soon it was the birthday of {elder}. {hero} wanted to give a present.
        - "Tomorrow is the birthday of {elder}," said {hero}. "I need a present."

        - "But I have only one coin," {he} told {his} friend {friend}.
        - {He} had no money. "What can I give?" {he} asked {his} friend {friend}.

        - "You can make {a look} {gift}!" said {friend}.
        - "How about {a look} {gift}?" asked {friend}. "We can make it!"

        - {hero} wanted to make the {gift} at once. They looked around and found {gather}.
        - "Yes, {a gift}!" said {hero}. They went to get {gather}.

        - All afternoon, {hero} worked on the {gift}. {He} {make}.
        - The {gift} was not easy to make, but {hero} {make}.

        - The next day, {hero} said, "Happy birthday! I made this for you."
        - In the morning, {hero} ran to {elder}. "Surprise!" {he} called.

        - "What a lovely {gift}!" said {elder} and {use}.
        - "You made this {gift}? It is beautiful!" said {elder} and {use}.

        - {hero} learned that the best gifts come from the heart.
        - {hero} smiled. A gift made with love is better than gold.
        - {hero} got a big hug and felt warm and happy.
        """
    ),
)

CARES = table(
    """
    ill / kind / show
    a cold, a fever, a sore throat, a bad cough / chicken, noodle, tomato, carrot \
    / put on a puppet show, read a funny story, sang a silly song, told a tale about a bear
    """
)

SICK_FRIEND = Plot(
    (cast("Theo", "Molly", "Grandpa"), HOMES, CARES),
    OPENING
    + script(
        """
        - {hero} and {his} friend {friend} played together every day.
        - {His} best friend was {friend}, who lived next door.

        - But one day, {friend} did not come out to play.
        - But one day, {hero} waited and waited for {friend}.

        - "{friend} has {ill} and must stay in bed," said {elder}.
        - {elder} told {him}, "{friend} is sick today. {Friend_he} has {ill}."

        - {hero} was worried. "How can I help {friend_him}?" {he} asked.
        - "Poor {friend}!" said {hero}. "I want to make {friend_him} happy."

        - "We can make some {kind} soup," said {elder}.
        - {elder} had an idea. "Let us cook some {kind} soup."

        - They carried the warm soup to {friend}.
        - {hero} carried the soup and did not spill a drop.

        - {friend} lay in bed with a red nose. "You came!" {friend_he} said.
        - {friend} looked pale and tired. But when {friend_he} saw {hero}, {friend_he} smiled.

        - {friend} had the soup, and {hero} {show}.
        - "The soup tastes good," said {friend}. Then {hero} {show}.

        - {friend} laughed and felt better already. {hero} was glad.
        - A few days later, {hero} and {friend} could play outside again.
        - They both learned that a visit from a friend is good medicine.
        """
    ),
)

GIVING = (SHARE_TREAT, GIFT, SICK_FRIEND)
