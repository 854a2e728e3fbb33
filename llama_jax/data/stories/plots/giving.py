"""Stories of giving: half a cookie, a present made by hand, soup for a sick friend."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import FAIR_DAYS, HOMES, OPENING, cast

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
